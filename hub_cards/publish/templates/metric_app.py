"""The page of a metric as a Space. The widget of `evaluate` itself works with gradio 3 only."""

from pathlib import Path

import evaluate
import gradio

HERE = Path(__file__).resolve().parent
(module,) = [path for path in HERE.glob("*.py") if path.name not in ("app.py", "metrics.py")]
metric = evaluate.load(str(module))
COLUMNS = {"predictions": "texts, one in a line", "references": "as many real texts, one in a line"}
asked = [name for name in COLUMNS if name in metric.features]
has_model = "model_id" in metric.inputs_description


def compute(*values):
    texts = {name: value.splitlines() for name, value in zip(asked, values, strict=False)}
    return metric.compute(**texts, **({"model_id": values[-1]} if has_model else {}))


inputs = [gradio.Textbox(lines=8, label=COLUMNS[name]) for name in asked]
inputs += [gradio.Textbox("gpt2", label="causal language model")] if has_model else []
description, article = metric.info.description, f"```{metric.info.inputs_description}```"
gradio.Interface(compute, inputs, gradio.JSON(), title=metric.name, description=description, article=article).launch()
