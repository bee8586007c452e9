"""The page of this metric as a Space. The widget of `evaluate` itself works with gradio 3 only."""

from pathlib import Path

import evaluate
import gradio

metric = evaluate.load(str(Path(__file__).with_name("token_entropy.py")))


def compute(predictions):
    return metric.compute(predictions=predictions.splitlines())


inputs = [
    gradio.Textbox(lines=8, label="texts, one in a line"),
]
description, article = metric.info.description, f"```{metric.info.inputs_description}```"
gradio.Interface(compute, inputs, gradio.JSON(), title=metric.name, description=description, article=article).launch()
