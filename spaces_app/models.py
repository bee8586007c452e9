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
from transformers.utils import CONFIG_NAME, cached_file

NEARBY = Path(__file__).resolve().parent.parent / "hub_cards" / "edlm-stories"  # in a clone
CARD = Path(__file__).resolve().parent / "README.md"
CODE = {"trust_remote_code": True}
SCORERS = ("judge", "ar")  # subfolders of a repo, the first one that is there


def allowed() -> list[str]:
    """What may be loaded, the default first: EDLM_REPO, else the model of a clone, else those that the card names; then
    those of EDLM_ALLOWED.
    """
    named = os.environ.get("EDLM_REPO") or (str(NEARBY) if NEARBY.is_dir() else None)
    default = [named] if named else (metadata_load(CARD) or {}).get("models") or []
    return list(dict.fromkeys([*default, *os.environ.get("EDLM_ALLOWED", "").replace(",", " ").split()]))


class Loaded:
    """A model in memory with what belongs to it.

    scorer: the causal model of its folder `judge`, else of `ar`; None without either. scores_itself: whether that is
    the energy that chose the texts. lock: held while it computes, so that one request runs at a time.
    """

    def __init__(self, name: str):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.name, self.lock = name, threading.Lock()
        where = CODE | ({"dtype": torch.float32} if device == "cpu" else {})  # most CPUs are slow in bfloat16
        self.model = AutoModel.from_pretrained(name, **where).to(device).eval()
        self.base = self.model.name_or_path  # of an adapter: what it was trained over
        self.tokenizer = AutoTokenizer.from_pretrained(self.base, **CODE)
        part = next((part for part in SCORERS if self.has(part)), None)
        self.scorer = (
            part and AutoModelForCausalLM.from_pretrained(self.base, subfolder=part, **where).to(device).eval()
        )
        self.scores_itself = part == "ar" and self.model.energy_type in ("ar", "coar")
        self.mask, self.longest = self.model.config.mask_token_id, self.model.config.max_position_embeddings
        self.ends = set(self.model.generation_config.eos_token_ids)
        # whether a token begins with the space before its word, as word pieces do
        self.joins_spaces = len(self.ids(" a")) == len(self.ids("a"))

    def has(self, part: str) -> bool:
        """Whether the repo has a model in this subfolder."""
        return bool(cached_file(self.base, CONFIG_NAME, subfolder=part, _raise_exceptions_for_missing_entries=False))

    def ids(self, text: str) -> list[int]:
        """The tokens of a text in which nothing stands for a special token."""
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids

    def text(self, ids: list[int]) -> str:
        """What is read of these tokens: special ones are no text."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)


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
