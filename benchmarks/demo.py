"""`make demo`: the full pipeline from built-in text to generated text, with user commands and their times.

python -m benchmarks.demo [steps=20 ...] passes overrides to train.py. A second run reuses existing results.
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

from data.shards import Shard
from data.tokenizer import load_tokenizer

RUN, CORPUS = Path("runs/demo"), Path("corpora/builtin")
MEMORY_EVERY_S = 1.0
PROMPTS = ("def read(self", "The default value is", "import os")


def step(title: str, *command: str, keep: Path | None = None) -> int:
    """Run a command, print its time, return its sampled peak memory in bytes; `keep` is a file for its output."""
    print(f"\n=== {title}\n$ python {' '.join(command)}", flush=True)
    start, peak = time.perf_counter(), 0
    with (
        keep.open("w", encoding="utf-8") if keep else nullcontext() as file,
        Popen([sys.executable, *command], stdout=file) as process,
    ):
        while process.poll() is None:
            with suppress(TimeoutExpired):
                process.wait(MEMORY_EVERY_S)
            peak = max(peak, memory_of_tree(process.pid))
    if keep:
        print(keep.read_text(encoding="utf-8"), end="")
    if process.returncode:
        sys.exit(process.returncode)
    print(f"    ({time.perf_counter() - start:.0f} s)", flush=True)
    return peak


def memory_of_tree(root: int) -> int:
    """Return the bytes of a process and its descendants, with shared pages counted once; 0 if unknown."""
    parents, total = {}, 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # the process has ended
            parents[int(stat.parent.name)] = int(stat.read_text(encoding="utf-8").rpartition(")")[2].split()[1])
    for process in parents:
        ancestor = process
        while ancestor != root and ancestor in parents:
            ancestor = parents[ancestor]
        if ancestor == root:
            with suppress(OSError):
                lines = Path(f"/proc/{process}/smaps_rollup").read_text(encoding="utf-8").splitlines()
                total += sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total


def gzip_bits_per_byte() -> float:
    """Return the bits per byte of the validation text compressed by gzip -9."""
    tokenizer = load_tokenizer(CORPUS / "tokenizer")
    texts = []
    for header in sorted((CORPUS / "valid").glob("*.json")):
        shard = Shard(header.with_suffix(""))
        texts += [tokenizer.decode(shard.document(i).tolist()) for i in range(shard.n_documents)]
    raw = "".join(texts).encode()
    return 8 * len(gzip.compress(raw, 9)) / len(raw)


def main(overrides: list[str]) -> None:
    # Ctrl-C also reaches the command, which saves and exits; its exit code ends the demo.
    signal.signal(signal.SIGINT, lambda *_: None)
    start = time.perf_counter()
    memory = [
        step("1/4 prepare the built-in text", "prepare_data.py", "data=builtin"),
        step("2/4 train and evaluate", "train.py", "experiment=demo", *overrides),
        step("3/4 export, and load the export with transformers", "export.py", f"run={RUN}"),
    ]
    (RUN / "prompts.txt").write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    options = (f"prompts={RUN / 'prompts.txt'}", "max_new_tokens=48", "temperature=0.7", "top_p=0.9")
    title = "4/4 generate three samples"
    memory.append(step(title, "generate.py", f"hf={RUN / 'hf'}", *options, keep=RUN / "samples.txt"))
    records = [json.loads(line) for line in (RUN / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    model_bits = next(r["valid/bits_per_byte"] for r in reversed(records) if "valid/bits_per_byte" in r)
    # including the largest process, in case sampling missed its peak
    peak = max(*memory, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
    print(f"\n=== made in {time.perf_counter() - start:.0f} s, peak memory {peak / 2**30:.2f} GiB")
    print(f"validation text   {model_bits:.3f} bits per byte by the model, {gzip_bits_per_byte():.3f} by gzip -9")
    print(f"run folder        {RUN}")
    print(f"loss curve        {RUN / 'loss.png'}")
    print(f"exported model    {RUN / 'hf'}")
    print(f"three samples     {RUN / 'samples.txt'}")
    print("next              python train.py model=125m data=builtin; then see README.md")


if __name__ == "__main__":
    main(sys.argv[1:])
