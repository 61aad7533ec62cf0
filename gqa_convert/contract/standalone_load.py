"""Load converted folders as one who has never heard of this package does, and run them.

    python stranger.py FOLDER...

Each folder is loaded with `trust_remote_code=True` and run on its `inputs.pt`, which holds the arguments of a forward
pass, and `logits`, what it must give. One JSON line a folder says how far from that it is and what loading reported.
"""

import json
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """Run every folder that is named."""
    sys.modules["gqa_convert"] = None  # type: ignore[assignment]  # importing it anywhere below would fail
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for folder in sys.argv[1:]:
        try:
            answer = meet(Path(folder))
        except Exception as error:  # what one folder does wrong says nothing about the next
            answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        sys.stdout.write(json.dumps(answer) + "\n")


def meet(folder: Path) -> dict[str, Any]:
    """Load one folder by the Auto class that its configuration names and compare its logits."""
    import torch
    import transformers

    config = json.loads((folder / "config.json").read_text())
    auto = max((name for name in config["auto_map"] if name != "AutoConfig"), key=len)  # with a head, if there is one
    saved = torch.load(folder / "inputs.pt", weights_only=True)
    expected = saved.pop("logits")
    model, info = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    if "encoder_hidden" in saved:
        states = saved.pop("encoder_hidden")
        saved["encoder_outputs"] = transformers.modeling_outputs.BaseModelOutput(last_hidden_state=states)
        saved["encoder_outputs"].attention_mask = None
    with torch.no_grad():
        seen = model.eval()(**saved, use_cache=False).logits
    scale = float(expected.abs().max())
    return {
        "class": type(model).__name__,
        "module": type(model).__module__.split(".")[0],
        "troubles": {kind: sorted(map(str, keys)) for kind, keys in info.items() if keys},
        "difference": float((seen - expected).abs().max()) / scale,
    }


if __name__ == "__main__":
    main()
