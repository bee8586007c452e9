"""Write a model card from a results file: what is measured in it comes from that file.

    python hub_cards/make_card.py hub_cards/results/edlm-wiki27.json

The card goes to the folder of the same name beside `results/`, under a temporary name that is renamed.
"""

import argparse
import json
import os
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

TEMPLATE = Path(__file__).parent / "card_template.md"


def render(results_file: Path) -> str:
    """The card as it stands in `<name>/README.md` for `results/<name>.json`."""
    results = json.loads(results_file.read_text(encoding="utf-8"))
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
        name=results_file.stem,
        results_file=f"hub_cards/results/{results_file.name}",
        **results,
    )
    return str(card).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    results_file = parser.parse_args().results
    card = results_file.parent.parent / results_file.stem / "README.md"
    temporary = card.with_name("README.md.tmp")
    temporary.write_text(render(results_file), encoding="utf-8")
    os.replace(temporary, card)
    print(f"wrote {card}")


if __name__ == "__main__":
    main()
