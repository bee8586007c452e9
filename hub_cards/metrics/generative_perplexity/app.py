"""The page of this metric as a Space. The widget of `evaluate` itself works with gradio 3 only."""

from pathlib import Path

import evaluate
import gradio

metric = evaluate.load(str(Path(__file__).with_name("generative_perplexity.py")))


def compute(predictions, model_id):
    return metric.compute(predictions=predictions.splitlines(), model_id=model_id)


inputs = [
    gradio.Textbox(lines=8, label="texts, one in a line"),
    gradio.Textbox("gpt2", label="causal language model"),
]
description, article = metric.info.description, f"```{metric.info.inputs_description}```"
gradio.Interface(compute, inputs, gradio.JSON(), title=metric.name, description=description, article=article).launch()
