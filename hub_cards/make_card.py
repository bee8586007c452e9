"""Write a model card from a results file: every number in it is one of that file.

    python hub_cards/make_card.py hub_cards/results/edlm-wiki27.json

The card goes to the folder of the same name beside `results/`, under a temporary name that is renamed.
"""

import argparse
import json
import os
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

TEMPLATE = Path(__file__).parent / "card_template.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    options = parser.parse_args()
    results = json.loads(options.results.read_text(encoding="utf-8"))
    name = options.results.stem
    folder = options.results.parent.parent / name
    data = ModelCardData(
        language="en",
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["edlm", "masked-diffusion", "energy-based-model", "custom_code"],
    )
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        name=name,
        results_file=f"hub_cards/results/{options.results.name}",
        code_files=sorted(path.name for path in (Path(__file__).parent.parent / "modeling_edlm").glob("*.py")),
        **results,
    )
    temporary = folder / "README.md.tmp"
    temporary.write_text(str(card).rstrip() + "\n", encoding="utf-8")
    os.replace(temporary, folder / "README.md")
    print(f"wrote {folder / 'README.md'}")


if __name__ == "__main__":
    main()
