"""`make demo`: from built-in text to a model that talks, by the commands a user types, with their times."""

import gzip
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

from data.shards import Shard
from data.tokenizer import load_tokenizer

RUN, CORPUS = Path("runs/demo"), Path("corpora/builtin")
PROMPTS = ("def read(self", "The default value is", "import os")


def step(title: str, *command: str) -> None:
    """Run one command of the road, show it, and say how long it took."""
    print(f"\n=== {title}\n$ python {' '.join(command)}", flush=True)
    start = time.perf_counter()
    done = subprocess.run([sys.executable, *command])
    if done.returncode:
        sys.exit(done.returncode)
    print(f"    ({time.perf_counter() - start:.0f} s)", flush=True)


def gzip_bits_per_byte() -> float:
    """Compress the validation text with gzip -9, and give the bits it needs for a byte."""
    tokenizer = load_tokenizer(CORPUS / "tokenizer")
    texts = []
    for header in sorted((CORPUS / "valid").glob("*.json")):
        shard = Shard(header.with_suffix(""))
        texts += [tokenizer.decode(shard.document(i).tolist()) for i in range(shard.n_documents)]
    raw = "".join(texts).encode()
    return 8 * len(gzip.compress(raw, 9)) / len(raw)


def main() -> None:
    start = time.perf_counter()
    precision = "bf16" if torch.cuda.is_available() else "fp32"
    step("1/4 prepare the built-in text", "prepare_data.py", "data=builtin")
    step("2/4 train and evaluate", "train.py", "experiment=demo", f"precision={precision}")
    step("3/4 export, and load the export with transformers", "export.py", f"run={RUN}")
    Path(RUN / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    options = ("max_new_tokens=48", "temperature=0.7", "top_p=0.9")
    step(
        "4/4 three samples of text",
        "generate.py",
        f"hf={RUN / 'hf'}",
        f"prompts={RUN / 'prompts.txt'}",
        *options,
    )
    records = [json.loads(line) for line in (RUN / "metrics.jsonl").read_text().splitlines()]
    ours = next(r["valid/bits_per_byte"] for r in reversed(records) if "valid/bits_per_byte" in r)
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(f"\n=== made in {time.perf_counter() - start:.0f} s, largest process {memory:.2f} GiB")
    print(f"validation text   {ours:.3f} bits a byte by the model, {gzip_bits_per_byte():.3f} by gzip -9")
    print(f"run folder        {RUN}")
    print(f"loss curve        {RUN / 'loss.png'}")
    print(f"exported model    {RUN / 'hf'}")
    print("next              python train.py model=125m data=builtin; README.md has the road")


if __name__ == "__main__":
    main()
