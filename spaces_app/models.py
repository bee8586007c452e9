"""Load models by name: the repos that may bring code, each loaded once and kept.

A name is a Hub repo or a local folder, of a whole model or of an adapter, whose base the library then loads with it.
"""

import os
import threading
from pathlib import Path

import torch
from huggingface_hub import metadata_load
from limits import Refused, shown
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

NEARBY = Path(__file__).resolve().parent.parent / "hub_cards" / "edlm-wiki27"  # in a clone
CARD = Path(__file__).resolve().parent / "README.md"
CODE = {"trust_remote_code": True}


def allowed() -> list[str]:
    """What may be loaded, the default first: EDLM_REPO, else the model of a clone, else those that the card names; then
    those of EDLM_ALLOWED.
    """
    named = os.environ.get("EDLM_REPO") or (str(NEARBY) if NEARBY.is_dir() else None)
    default = [named] if named else (metadata_load(CARD) or {}).get("models") or []
    return list(dict.fromkeys([*default, *os.environ.get("EDLM_ALLOWED", "").replace(",", " ").split()]))


class Loaded:
    """A model in memory with what belongs to it: tokenizer, and the causal model of its folder `ar`, if there is one.

    lock: held while it computes, so that one request runs at a time.
    """

    def __init__(self, name: str):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.name, self.lock = name, threading.Lock()
        self.model = AutoModel.from_pretrained(name, **CODE).to(device).eval()
        self.base = self.model.name_or_path  # of an adapter: what it was trained over
        self.tokenizer = AutoTokenizer.from_pretrained(self.base, **CODE)
        try:
            self.scorer = AutoModelForCausalLM.from_pretrained(self.base, subfolder="ar", **CODE).to(device).eval()
        except OSError:  # it has none
            self.scorer = None
        self.mask, self.longest = self.model.config.mask_token_id, self.model.config.max_position_embeddings

    @property
    def scores_itself(self) -> bool:
        """Whether the causal model that judges the texts is also the energy that chose them."""
        return self.model.energy_type in ("ar", "coar")


class Models:
    """Those that are loaded, by name."""

    def __init__(self):
        self.lock, self.loaded = threading.Lock(), {}

    def get(self, name: str = "") -> Loaded:
        """Load a model unless it is there; no name: the default.

        Raises:
            Refused: a name that is not on the list.
        """
        names = allowed()
        if not names:
            raise Refused("this Space has no model: set the variable EDLM_REPO to a model's repo or folder")
        name = name or names[0]
        if name not in names:
            raise Refused(
                f"model must be one of {', '.join(names)}, got {shown(name)}: a repo's code runs on this machine, so "
                "its owner lists which ones may (EDLM_ALLOWED); in a copy of this Space that is you"
            )
        with self.lock:
            if name not in self.loaded:
                self.loaded[name] = Loaded(name)
            return self.loaded[name]

    def ready(self, name: str = "") -> Loaded | None:
        """The model if it is loaded already."""
        return self.loaded.get(name or next(iter(allowed()), ""))

    def start_loading(self) -> None:
        """Load the default in the background; if that fails, the first request says why."""
        threading.Thread(target=self._try, daemon=True).start()

    def _try(self) -> None:
        try:
            self.get()
        except Exception as error:
            print(f"the model was not loaded: {error}", flush=True)
