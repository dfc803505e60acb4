"""Break one guard after the other and check that the test that is meant to notice does: python -m tests.mutants [K/N]

With K/N, every N-th guard from the K-th on. Works on a copy of the files that git knows.
"""

import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
LIMIT_S = 300


@dataclass(frozen=True)
class Mutant:
    """A case of docs/faults.md, the code that guards against it, what breaks that code, and the test that notices."""

    case: int
    file: str
    code: str
    broken: str
    test: str
    hangs: bool = False  # the test, without the guard


GUARDS, SAVES = "tests/training/test_guards.py", "tests/training/test_checkpoint.py"
FAULTS, STATUS, BEATS = "tests/test_faults.py", "tests/tracking/test_status.py", "tests/tracking/test_heartbeat.py"
TWO, SIGNALS, HANGS = "tests/test_two_ranks.py", "tests/test_signals.py", "tests/test_hangs.py"
BEHIND, STATE = "tests/training/test_background_save.py", "tests/training/test_state.py"
SAVE, FOLDER = "training/checkpoint.py", "tracking/run_folder.py"
STOP, BEAT = "training/stop.py", "tracking/heartbeat.py"
MUTANTS = [
    Mutant(1, "training/ranks.py", 'raise CheckpointError(f"rank {self.rank} lost the others: {reason_of(error)}") from error', "pass",
           f"{TWO}::test_a_peer_killed"),
    Mutant(2, SAVE, "os.rename(partial_dir, final)", "shutil.copytree(partial_dir, final)", f"{GUARDS}::test_files_are_synced"),
    Mutant(3, SAVE, "                shutil.rmtree(partial_dir, ignore_errors=True)\n            why", "                pass\n            why",
           f"{SAVES}::test_full_disk"),
    Mutant(4, SAVE, "        check_complete(read_metadata(folder)", "        (lambda *_: None)(read_metadata(folder)", f"{GUARDS}::test_lost_writes"),
    Mutant(6, SAVE, "    if sync:\n", "    if False:\n", f"{GUARDS}::test_files_are_synced"),
    Mutant(6, SAVE, '_fsync(folder / "manifest.json")', "pass", f"{GUARDS}::test_files_are_synced"),
    Mutant(5, "training/resume.py", "            if last or self.config.checkpoint.on_save_error is OnSaveError.stop:", "            if last:",
           f"{BEHIND}::test_failed_background"),
    Mutant(7, FOLDER, "            self.failing = True", "            self.kept = b''", "tests/test_full_disk.py::test_a_disk_that_is_full_for"),
    Mutant(8, SAVE, '        write_atomically(begun, "")\n', "", f"{SAVES}::test_read_only_folder_is_refused"),
    Mutant(9, "training/resume.py", "        self.note_saved(wait=True)\n        if self.saved_step",
           "        self.note_saved()\n        if self.saved_step", "tests/training/test_slow_save.py::test_a_save_under"),
    Mutant(10, SAVE, '    except OSError as error:\n        logger.warning("%s could not be removed',
           '    except KeyError as error:\n        logger.warning("%s could not be removed',
           f"{GUARDS}::test_unremovable"),
    Mutant(11, SAVE, "        os.rename(folder, trash)", "        trash = folder", f"{SAVES}::test_kill_leaves"),
    Mutant(12, FOLDER, "fcntl.LOCK_EX | fcntl.LOCK_NB", "fcntl.LOCK_SH | fcntl.LOCK_NB",
           "tests/tracking/test_run_folder.py::test_a_held_folder"),
    Mutant(13, SAVE, "            if self.ranks.on_first(final.exists):", "            if False:", f"{SAVES}::test_step_is_never"),
    Mutant(14, SAVE, "self.ranks.on_first(self._found)", "self._found()",
           f"{GUARDS}::test_first_rank"),
    Mutant(15, "tracking/store.py", "            if describe(there) != describe(here):", "            if False:",
           "tests/test_store.py::test_partial_copy"),
    Mutant(16, SAVE, ' != expected["size"]:', ' == "":', f"{GUARDS}::test_wrong_size"),
    Mutant(17, SAVE, ") != expected:", ") == 0:", f"{SAVES}::test_damaged_one"),
    Mutant(18, SAVE, "    except (ValueError, KeyError, TypeError):", "    except KeyError:", f"{SAVES}::test_damaged_one"),
    Mutant(19, SAVE, "        elif damaged:", "        elif False:", f"{SAVES}::test_only_damaged"),
    Mutant(20, "training/resume.py", "self.rng_name if self.rng_name in checkpoint.tensors else FIRST_RNG", "self.rng_name",
           f"{TWO}::test_one_process"),
    Mutant(20, "data/loader.py", "of_step(step: int, sample: int)", "of_step(step: int, sample: int, dp_rank: int = 0)",
           f"{TWO}::test_one_process"),
    Mutant(21, "conf/schema.py", "or self.global_batch_tokens < 1 or self.global_batch_tokens % unit:", "or self.global_batch_tokens < 1:",
           "tests/test_cli.py::test_everything_wrong"),
    Mutant(22, FOLDER, "and before[key] != now[key]]", "and False]",
           "tests/tracking/test_run_folder.py::test_stored_configurations"),
    Mutant(23, SAVE, "saved.properties.dtype) != (tensor.shape, tensor.dtype)", ") != (tensor.shape,)",
           f"{SAVES}::test_other_names"),
    Mutant(24, "training/resume.py", "changed, key = saved != parts", "changed, key = False", "tests/test_train.py::test_changed_data"),
    Mutant(25, SAVE, "    if version != FORMAT_VERSION:", "    if False:", f"{SAVES}::test_other_format"),
    Mutant(26, "training/metadata.py", "if not is_dtype and name not in PICKLED_NAMES.get(module, ()):", "if False:",
           f"{SAVES}::test_metadata_runs_no_code"),
    Mutant(27, FOLDER, "    if step not in steps:", "    if False:", f"{GUARDS}::test_missing_step"),
    Mutant(28, FOLDER, "if STEP.fullmatch(path.name)), reverse=True",
           "if STEP.fullmatch(path.name)), key=lambda p: p.stat().st_mtime, reverse=False", f"{SAVES}::test_round_trip"),
    Mutant(29, "tracking/status.py", "            if SYMPTOM.search(reason):", "            if False:",
           f"{STATUS}::test_a_symptom_gives_way"),
    Mutant(29, BEAT, 'if sign["host"] == socket.gethostname():', "if False:", f"{STATUS}::test_a_rank_that_died"),
    Mutant(30, BEAT, "if waited_s > self.late_s and not reported:", "if False:", f"{BEATS}::test_a_stopped_process"),
    Mutant(30, BEAT, 'if "at" in sign and not sign["waits"]', "if False", f"{BEATS}::test_a_rank_in_no"),
    Mutant(30, BEAT, 'if time.time() >= sign["due"]:', "if False:", f"{HANGS}::test_a_rank_that_hangs[stop"),
    Mutant(30, BEAT, "waits = self.pending() or", "waits = self.pending() and", f"{HANGS}::test_a_rank_that_hangs[hang"),
    Mutant(30, BEAT, "                self.expire()", "                pass", f"{BEATS}::test_one_late_process"),
    Mutant(31, BEAT, "if not found and len(waits) > 1:", "if False:", f"{BEATS}::test_ranks_in_different"),
    Mutant(32, STOP, "        self.before = handle(SIGNALS, self._handle)", "        self.before = {}", f"{STATE}::test_signals"),
    Mutant(33, STOP, "        if self.mesh is not None:", "        if False:", f"{FAULTS}::test_a_signal_to_one[validation", hangs=True),
    Mutant(33, "training/loop.py", "lambda _: run.agree()", "lambda _: not run.stop", f"{FAULTS}::test_a_signal_to_one[validation"),
    Mutant(34, "launch/ranks.py", "signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP)", "signal.SIGTERM, signal.SIGHUP)",
           f"{STATE}::test_signals"),
    Mutant(34, "launch/ranks.py", "        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: save", "        # save",
           f"{SIGNALS}::test_a_torchrun"),
    Mutant(35, STOP, "if signum == signal.SIGINT and", "if", f"{STATE}::test_signals"),
    Mutant(35, "training/loop.py", "(run.checkpoints.save(), run.agree())", "run.checkpoints.save()",
           f"{FAULTS}::test_a_signal_to_one[save"),
    Mutant(36, "launch/ranks.py", "if deadline is None and self._has_a_failure():",
           "if deadline is None and (self.signum or self._has_a_failure()):", f"{SIGNALS}::test_a_save_longer"),
    Mutant(37, "parallel/mesh.py", "    except dist.DistError as error:", "    except KeyError as error:",
           "tests/parallel/test_mesh.py::test_port_in_use"),
    Mutant(38, "data/loader.py", "timeout=config.worker_timeout_s if config.workers else 0", "timeout=0",
           "tests/data/test_loader.py::test_a_worker_that_hangs[hangs", hangs=True),
    Mutant(39, "tracking/loggers.py", "        except Exception as error:", "        except ZeroDivisionError as error:",
           "tests/tracking/test_loggers.py::test_a_failing_logger"),
    Mutant(40, "parallel/engine.py", "        self.mesh.sum_(figures)\n        totals", "        totals", f"{TWO}::test_a_nonfinite"),
    Mutant(41, "parallel/engine.py", "finite = torch.isfinite(grad_norm) &", "finite = torch.ones_like(grad_norm, dtype=torch.bool) |",
           "tests/parallel/test_engine.py::test_nonfinite_step"),
    Mutant(42, "training/loop.py", "        if in_a_row >= limit:", "        if False:", "tests/test_train.py::test_nonfinite_gradients"),
    Mutant(43, "training/spikes.py", "        if value > limits[name]:", "        if False:", "tests/tracking/test_alerts.py::test_a_spike"),
    Mutant(43, "training/state.py", "recent: dict[str, list[float]] = field(default_factory=dict)",
           'recent: dict[str, list[float]] = field(default_factory=dict, metadata={"saved": False})',
           "tests/tracking/test_alerts.py::test_a_spike"),
    Mutant(44, "training/agreement.py", "            if digest != expected:", "            if False:", f"{GUARDS}::test_differing_replicas"),
    Mutant(44, "training/resume.py", "        check_tensors(tensors, self.checkpoints.ranks", "        (lambda *_: None)(tensors, self.checkpoints.ranks",
           f"{TWO}::test_a_flipped_sign[save"),
    Mutant(44, "training/loop.py", "lambda run: run.checkpoints.check()", "lambda run: None", f"{TWO}::test_a_flipped_sign[check"),
    Mutant(45, "data/dataset.py", "if rows.tokens.view(np.uint32).max() >= self.vocab_size:", "if False:",
           "tests/data/test_loader.py::test_id_outside"),
    Mutant(46, "data/shards.py", "if not known or index_bytes not in", "if not known and index_bytes not in",
           "tests/data/test_shards.py::test_damaged_shard"),
    Mutant(47, "corpus/documents.py", "except (ValueError, RecursionError) as error:", "except RecursionError as error:",
           "tests/corpus/test_readers.py::test_bad_record_is"),
    Mutant(48, "conf/schema.py", '        yield from _below(self, 1, "steps", "valid_tokens")\n', "",
           "tests/test_cli.py::test_everything_wrong"),
    Mutant(49, "training/agreement.py", '{"code": code_files(), **facts}', "facts", f"{TWO}::test_a_rank_with"),
]  # fmt: skip


def notices(mutant: Mutant, copy: Path) -> str:
    """Run the test of a guard that is broken in a copy; return what is wrong with the outcome, or ""."""
    file = copy / mutant.file
    text = file.read_text(encoding="utf-8")
    if text.count(mutant.code) != 1:
        return f"{mutant.file} has {mutant.code!r} {text.count(mutant.code)} times; write it anew"
    path, _, name = mutant.test.partition("::")
    words = name.replace("[", " and ").replace("]", "")
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", "-p", "no:cacheprovider", path, "-k", words]
    broken = text.replace(mutant.code, mutant.broken)
    compile(broken, mutant.file, "exec")
    file.write_text(broken, encoding="utf-8")
    try:
        done = subprocess.run(command, cwd=copy, capture_output=True, text=True, timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        return "" if mutant.hangs else f"{mutant.test} hangs"
    finally:
        file.write_text(text, encoding="utf-8")
    # It may have ended by a signal that the guard handles, SIGINT by exit code 2.
    if done.returncode < 0 or done.returncode == 2 or "\nFAILED " in done.stdout:
        return ""
    return f"{mutant.test} does not notice: {(done.stdout + done.stderr).strip()[-200:]}"


def main(part: str = "1/1") -> None:
    first, every = map(int, part.split("/"))
    names = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines()
    survivors = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        for name in names:
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
        for mutant in MUTANTS[first % every :: every]:
            problem = notices(mutant, copy)
            survivors += bool(problem)
            print(f"case {mutant.case:2d}  {problem or mutant.test}", flush=True)
    sys.exit(f"error: {survivors} broken guards went unnoticed" if survivors else 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
