"""lm-evaluation-harness: an export and a run score alike in it, and as by our own tasks."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval", reason="requirements-dev.txt has it")

import evaluate
import export
from conf.schema import EvaluateConfig, ExportConfig
from data.mixed_text import mixed_lines
from model.config import ModelError
from parallel.config import Device, ParallelConfig
from parallel.mesh import Mesh
from tests.conftest import ran
from training.config import Dtype, TrainingError
from training.evaluation import PREFIX
from training.harness import HarnessModel
from training.load import open_saved
from training.preflight import preflight_problems
from training.setup import build_evaluator

CPU = Mesh(torch.device("cpu"))
TASKS = {
    "choices": 'output_type: multiple_choice\ndoc_to_text: "{{context}}"\ndoc_to_choice: "{{choices}}"\n'
    "doc_to_target: answer\nmetric_list:\n  - metric: acc\n  - metric: acc_norm\n",
    "texts": 'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{text}}"\n'
    "metric_list:\n  - metric: bits_per_byte\n",
    "written": 'output_type: generate_until\ndoc_to_text: "{{context}}"\ndoc_to_target: "{{written}}"\n'
    "generation_kwargs:\n  until: ['e']\n  max_gen_toks: 8\nmetric_list:\n  - metric: exact_match\n",
}


def harness_model(run: Path) -> Any:
    saved = open_saved(run)
    assert saved.tokenizer is not None
    engine = build_evaluator(saved, CPU, ParallelConfig(), Dtype.fp32)
    return HarnessModel(engine, saved.tokenizer, add_bos=saved.add_bos, batch_tokens=512)


def written(doc: dict[str, Any]) -> SimpleNamespace:
    """Return the request of the task `written`."""
    return SimpleNamespace(args=(doc["context"], {"until": ["e"], "max_gen_toks": 8}))


@pytest.fixture(scope="module")
def folder(run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, its export, and the same questions for the harness and for our tasks."""
    folder = tmp_path_factory.mktemp("harness")
    run = shutil.copytree(run_dir, folder / "run")
    export.export(ExportConfig(run=str(run), dtype=Dtype.fp32))
    lines = [line.strip() for line in mixed_lines() if 30 < len(line) < 50][:30]
    docs: list[dict[str, Any]] = []
    for i, line in enumerate(lines):
        wrong = lines[i - 1][15:]
        choices = [line[15:], wrong] if i % 2 else [wrong, line[15:]]
        docs.append({"context": line[:15].strip(), "choices": choices, "answer": 1 - i % 2, "text": line * 3})
    for i, (doc, new) in enumerate(zip(docs, harness_model(run).generate_until([*map(written, docs)]), strict=True)):
        doc["written"] = new if i % 2 and "\ufffd" not in new else "another"
    (folder / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    own = [{**doc, "continuations": [f" {choice}" for choice in doc["choices"]]} for doc in docs]
    kept = [{key: doc[key] for key in ("context", "continuations", "answer")} for doc in own]
    (folder / "own_choices.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in kept))
    (folder / "own_texts.jsonl").write_text("".join(json.dumps({"text": doc["text"]}) + "\n" for doc in docs))
    for name, text in TASKS.items():
        data = f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {folder}/docs.jsonl\ntest_split: test\n"
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{data}{text}")
    return folder


@pytest.mark.filterwarnings("ignore")
def test_harness_scores_of_run_and_export(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm_eval: Any = pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    config = EvaluateConfig(
        run=str(folder / "run"), harness=[f"{folder}/{name}.yaml" for name in TASKS], valid_tokens=0, dtype=Dtype.fp32,
        tasks=[f"{folder}/own_choices.jsonl", f"{folder}/own_texts.jsonl"], parallel=ParallelConfig(device=Device.cpu),
    )  # fmt: skip
    scores = evaluate.evaluate(config, open_saved(folder / "run"), CPU)
    export_args = {"pretrained": str(folder / "run" / "hf"), "dtype": "float32"}
    manager = lm_eval.tasks.TaskManager(include_path=str(folder))
    found = lm_eval.simple_evaluate(
        "hf", export_args, list(TASKS), device="cpu", task_manager=manager, bootstrap_iters=0
    )
    results = found["results"]
    for name, metrics in {
        "choices": ("acc", "acc_norm"),
        "texts": ("bits_per_byte",),
        "written": ("exact_match",),
    }.items():
        for metric in metrics:
            assert scores[f"{PREFIX}{name}/{metric}"] == pytest.approx(results[name][f"{metric},none"], rel=1e-5)
    assert scores[f"{PREFIX}own_choices/acc"] == results["choices"]["acc,none"]
    assert scores[f"{PREFIX}own_choices/acc_norm"] == results["choices"]["acc_norm,none"] not in (0, 1)
    assert scores[f"{PREFIX}own_texts/bpb"] == pytest.approx(results["texts"]["bits_per_byte,none"], rel=1e-5)

    model = harness_model(folder / "run")
    samples = found["samples"]["choices"]
    asked = [SimpleNamespace(args=pair) for sample in samples for pair in sample["arguments"]]
    theirs = [value for sample in samples for response in sample["resps"] for value in response]
    for (nll, greedy), (expected, is_greedy) in zip(model.loglikelihood(asked), theirs, strict=True):
        assert nll == pytest.approx(float(expected), abs=1e-4) and greedy == (str(is_greedy) == "True")
    wanted = [(sample["arguments"][0][0], sample["resps"][0][0]) for sample in found["samples"]["written"]]
    texts = model.generate_until([written({"context": context}) for context, _ in wanted])
    pairs = [pair for pair in zip(texts, (text for _, text in wanted), strict=True) if "\ufffd" not in "".join(pair)]
    assert len(pairs) > 20 and all(one == other for one, other in pairs), "half characters are decoded in other ways"
    with pytest.raises(TrainingError, match="do_sample"):
        model.generate_until([SimpleNamespace(args=("a", {"do_sample": True}))])


@pytest.mark.slow
def test_harness_scores_on_two_ranks_are_those_of_one(folder: Path, tmp_path: Path) -> None:
    tasks = ",".join(f"{folder}/{name}.yaml" for name in TASKS)
    found = list[dict[str, float]]()
    for layout in ("", "parallel=zero3 parallel.dp_shard=2", "parallel=tp parallel.tp=2"):
        run = shutil.copytree(folder / "run", tmp_path / f"run{len(found)}")
        options = ["valid_tokens=0", "dtype=fp32", "parallel.device=cpu", *layout.split()]
        ran("evaluate.py", f"run={run}", f"harness=[{tasks}]", *options, HF_DATASETS_CACHE=f"{run}/cache")
        found.append(json.loads((run / "evaluation.json").read_text())["10"])
    alone, *others = found
    assert len(alone) == 4 and 0 not in alone.values()
    for scores in others:
        assert scores == pytest.approx(alone, rel=1e-5)


def test_a_missing_harness_task_is_named(folder: Path) -> None:
    parallel = ParallelConfig(device=Device.cpu)
    config = EvaluateConfig(run=str(folder / "run"), harness=["no.yaml"], parallel=parallel)
    assert [*preflight_problems(config)] == [
        str(ModelError("harness (no.yaml) does not exist; name a task's .yaml file, or a task by its name"))
    ]
