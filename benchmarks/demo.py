"""`make demo`: from built-in text to a model that talks, by the commands a user types, with their times.

python -m benchmarks.demo steps=20 passes settings on to train.py. A second time it uses what the first one made.
"""

import gzip
import json
import resource
import signal
import sys
import time
from contextlib import nullcontext, suppress
from pathlib import Path
from subprocess import Popen, TimeoutExpired

import torch

from data.shards import Shard
from data.tokenizer import load_tokenizer

RUN, CORPUS = Path("runs/demo"), Path("corpora/builtin")
LOOK_EVERY_S = 1.0  # at the memory
PROMPTS = ("def read(self", "The default value is", "import os")


def step(title: str, *command: str, keep: Path | None = None) -> int:
    """Run one command of the road, show it, and say how long it took; what it prints is put into `keep` as well.

    Gives the most memory that it was seen to use, in bytes.
    """
    print(f"\n=== {title}\n$ python {' '.join(command)}", flush=True)
    start, most = time.perf_counter(), 0
    with keep.open("w") if keep else nullcontext() as file, Popen([sys.executable, *command], stdout=file) as process:
        while process.poll() is None:
            with suppress(TimeoutExpired):
                process.wait(LOOK_EVERY_S)
            most = max(most, memory_of_tree(process.pid))
    if keep:
        print(keep.read_text(), end="")
    if process.returncode:
        sys.exit(process.returncode)
    print(f"    ({time.perf_counter() - start:.0f} s)", flush=True)
    return most


def memory_of_tree(root: int) -> int:
    """Give the bytes that a process and all that it started have, those that they share counted once; 0 if unknown."""
    parents, total = {}, 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it ended meanwhile
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    for process in parents:
        above = process
        while above != root and above in parents:
            above = parents[above]
        if above == root:
            with suppress(OSError):
                lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
                total += sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total


def gzip_bits_per_byte() -> float:
    """Compress the validation text with gzip -9, and give the bits it needs for a byte."""
    tokenizer = load_tokenizer(CORPUS / "tokenizer")
    texts = []
    for header in sorted((CORPUS / "valid").glob("*.json")):
        shard = Shard(header.with_suffix(""))
        texts += [tokenizer.decode(shard.document(i).tolist()) for i in range(shard.n_documents)]
    raw = "".join(texts).encode()
    return 8 * len(gzip.compress(raw, 9)) / len(raw)


def main(overrides: list[str]) -> None:
    # Ctrl-C reaches the command as well, which saves and ends, and the demo with it.
    signal.signal(signal.SIGINT, lambda *_: None)
    start = time.perf_counter()
    precision = "bf16" if torch.cuda.is_available() else "fp32"
    memory = [
        step("1/4 prepare the built-in text", "prepare_data.py", "data=builtin"),
        step("2/4 train and evaluate", "train.py", "experiment=demo", f"precision={precision}", *overrides),
        step("3/4 export, and load the export with transformers", "export.py", f"run={RUN}"),
    ]
    (RUN / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    options = (f"prompts={RUN / 'prompts.txt'}", "max_new_tokens=48", "temperature=0.7", "top_p=0.9")
    title = "4/4 three samples of text"
    memory.append(step(title, "generate.py", f"hf={RUN / 'hf'}", *options, keep=RUN / "samples.txt"))
    records = [json.loads(line) for line in (RUN / "metrics.jsonl").read_text().splitlines()]
    ours = next(r["valid/bits_per_byte"] for r in reversed(records) if "valid/bits_per_byte" in r)
    # No process was larger, whether it was looked at then or not.
    peak = max(*memory, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
    print(f"\n=== made in {time.perf_counter() - start:.0f} s, peak memory {peak / 2**30:.2f} GiB")
    print(f"validation text   {ours:.3f} bits a byte by the model, {gzip_bits_per_byte():.3f} by gzip -9")
    print(f"run folder        {RUN}")
    print(f"loss curve        {RUN / 'loss.png'}")
    print(f"exported model    {RUN / 'hf'}")
    print(f"three samples     {RUN / 'samples.txt'}")
    print("next              python train.py model=125m data=builtin; README.md has the road")


if __name__ == "__main__":
    main(sys.argv[1:])
