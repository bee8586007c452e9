"""Use a staged folder as a stranger would, in a process of its own: `push.py` runs this file before it uploads.

    python -P hub_cards/publish/try_folder.py KIND FOLDER [BASE [REVISION]]

KIND: model or causal (generates), energy or adapter (chooses for BASE), metric or dataset (loads). The package is not
imported: the code is the folder's own.
"""

import sys
from pathlib import Path

LENGTH = 16  # tokens


def main(kind: str, folder: str, base: str | None = None, revision: str = "main") -> str:
    if kind == "metric":
        import evaluate

        metric = evaluate.load(folder)
        return f"evaluate loads {metric.name}"
    if kind == "dataset":
        import datasets

        rows = datasets.load_dataset(folder)
        return ", ".join(
            f"{name}: {len(split)} rows of {', '.join(split.column_names)}" for name, split in rows.items()
        )

    import transformers

    if kind == "causal":
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        tokens = model.generate(max_length=LENGTH, do_sample=True)
    else:
        model = transformers.AutoModel.from_pretrained(base or folder, revision=revision, trust_remote_code=True)
        if base is not None:
            model = model.load_energy(folder)
        length = min(LENGTH, model.config.max_position_embeddings)
        tokens = model.generate(max_length=length, num_steps=4, num_candidates=2, energy_window=(1.0, 0.0), seed=0)
    if "modeling_edlm" in sys.modules:
        raise RuntimeError("the installed package was used in place of the folder's code")
    if list(Path(base or folder).glob("tokenizer*")):
        tokenizer = transformers.AutoTokenizer.from_pretrained(base or folder, trust_remote_code=True)
        return f"generated {tokenizer.decode(tokens[0])!r}"
    return f"generated {tokens[0].tolist()}"


if __name__ == "__main__":
    print(main(*sys.argv[1:]))
