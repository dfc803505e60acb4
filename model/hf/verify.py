"""Load a Hugging Face folder as a stranger would, and print how it differs from what was expected, as JSON.

Run as a script, in a process that cannot import this repository: `verify.py FOLDER EXPECTED.json`, where the JSON
holds texts with their token ids, and the path of a file with tokens and their logits.
"""

import json
import sys
from pathlib import Path
from typing import Any


def main(folder: str, expected_path: str) -> None:
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer, __version__

    expected = json.loads(Path(expected_path).read_text(encoding="utf-8"))
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, torch_dtype=torch.float32)
    model, info = loaded
    reference = load_file(expected["logits"])
    with torch.no_grad():
        logits = model.eval()(reference["tokens"]).logits
    tokenizer: Any = AutoTokenizer.from_pretrained(folder) if expected["texts"] else None
    wrong = []
    for text, ids in expected["texts"]:
        found = tokenizer(text, add_special_tokens=False)["input_ids"]
        if found != ids or tokenizer.decode(ids, skip_special_tokens=True) != text:
            wrong.append({"text": text, "expected": ids, "found": found})
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    result = {
        "transformers": __version__,
        "class": type(model).__name__,
        "keys": {kind: sorted(map(str, info[kind])) for kind in kinds},
        "logits_difference": float((logits - reference["logits"]).abs().max()),
        "wrong_texts": wrong,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
