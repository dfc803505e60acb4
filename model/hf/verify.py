"""Load a Hugging Face folder as a stranger would and compare it with what was expected.

Run as a script, in a process that cannot see this repository: `verify_hf.py FOLDER EXPECTED.json`,
where the JSON holds token ids, the logits' file, and texts with their ids. Prints its findings as JSON.
"""

import json
import sys
from pathlib import Path
from typing import Any


def main(folder: str, expected_path: str) -> None:
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer, __version__

    expected = json.loads(Path(expected_path).read_text())
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=False, output_loading_info=True, torch_dtype=torch.float32
    )
    model, info = loaded
    found: dict[str, Any] = {
        "transformers": __version__,
        "class": type(model).__name__,
        "keys": {key: sorted(map(str, info[key])) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")},
    }
    reference = load_file(expected["logits"])
    with torch.no_grad():
        logits = model.eval()(reference["tokens"]).logits
    found["logits_difference"] = float((logits - reference["logits"]).abs().max())
    if expected["texts"]:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        wrong = []
        for text, ids in expected["texts"]:
            got = tokenizer(text, add_special_tokens=False)["input_ids"]
            if got != ids or tokenizer.decode(ids, skip_special_tokens=True) != text:
                wrong.append({"text": text, "expected": ids, "found": got})
        found["texts"], found["wrong_texts"] = len(expected["texts"]), wrong[:5]
        found["wrong_count"] = len(wrong)
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
