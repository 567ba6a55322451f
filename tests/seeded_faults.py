"""Puts known faults into a copy of the package, one at a time, and says which of them the tests catch.

    python tests/seeded_faults.py                   # in the last commit
    python tests/seeded_faults.py --commit 9551056  # version 0.1, the suite before it was made fast
    python tests/seeded_faults.py --only labels     # faults whose name contains the word

The exit status is the number of faults that no test caught. Each fault is a piece of text that stands once in the
package, what takes its place, and the tests that must fail then; they are run before, and must pass.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Fault:
    """A mistake that somebody could make."""

    name: str
    changes: tuple[tuple[str, str], ...]
    """(text that stands once in the package, what takes its place); several where versions differ: the first found."""
    tests: tuple[str, ...]
    """Names of tests that catch it, with [case] where one is enough; several where versions differ: those found."""


FAULTS = (
    Fault(
        "the sign of a sum over tensor-parallel ranks is flipped",
        (("    total = values.clone()\n", "    total = -values.clone()\n"),),
        ("test_picks_and_utilities_are_those_of_one_process[tp2]",),
    ),
    Fault(
        "the stage is left out of the names that seed initial weights",
        (("offset = layers[0].layer_number - 1 if len(layers) else 0", "offset = 0"),),
        ("test_layout_equals_one_process[pp2]",),
    ),
    Fault(
        "a context-parallel rank reads the labels of another's positions",
        (
            ("own(known[:, 1:])", "known[:, 1:].chunk(cp, 1)[0]"),
            ("tokens[:, 1:].chunk(cp, 1)[cp_rank]", "tokens[:, 1:].chunk(cp, 1)[0]"),
        ),
        ("test_layout_equals_one_process[cp2]",),
    ),
    Fault(
        "data-parallel ranks weigh the proxy by their share, not by the batch",
        (
            (
                "found = torch.autograd.grad(losses.sum() / (sign * len(batch))",
                "found = torch.autograd.grad(losses.sum() / (sign * len(share))",
            ),
        ),
        ("test_two_ranks_select_what_one_process_selects",),
    ),
    Fault(
        "labels are shifted twice",
        (
            ("labels=cut.labels)", "labels=cut.labels.roll(-1, 1))"),
            ("labels = tokens[:, 1:] if cp == 1", "labels = tokens[:, 1:].roll(-1, 1) if cp == 1"),
        ),
        ("test_gradient_equals_plain_pytorch",),
    ),
    Fault(
        "copies in one buffer do not count as one sequence",
        (("repeat_interleave(sizes) + copies)", "repeat_interleave(sizes) + 1)"),),
        ("test_copies_in_one_buffer_count_as_one_sequence",),
    ),
    Fault(
        "a step of the window of exposures is kept too long",
        (("self._steps[0][0] <= step - self._window", "self._steps[0][0] < step - self._window"),),
        ("test_a_sequence_is_trained_on_once_in_a_window_of_steps",),
    ),
    Fault(
        "the order of a sequence's key is another",
        (
            (
                "json.dumps([corpus.fingerprint, split, seq_len, self.domains, *filtered])",
                "json.dumps([corpus.fingerprint, seq_len, split, self.domains, *filtered])",
            ),
        ),
        ("test_one_domain_alone_is_that_domains_permutation_at_any_buffer_size", "test_orders_of_candidates"),
    ),
    Fault(
        "the order of a counter's key does not matter",
        (
            (
                "state = _mix((_mix((state + _GAMMA) & _MASK) ^ part) & _MASK)",
                "state = _mix((state + _mix(part)) & _MASK)",
            ),
        ),
        ("test_keys_depend_on_every_part_and_their_order",),
    ),
    Fault(
        "the oracle's gradients are in single precision",
        (
            (
                "return tensor.to(torch.float64) if tensor.is_floating_point() else tensor",
                "return tensor.to(torch.float32) if tensor.is_floating_point() else tensor",
            ),
        ),
        ("test_ghost_gradients_are_exact_for_every_matrix_and_embedding",),
    ),
    Fault(
        "Adam's second moment is corrected for a step too many",
        (("1 - beta2**step) if corrected", "1 - beta2 ** (step + 1)) if corrected"),),
        ("test_adam_operator_is_the_difference_of_its_updates",),
    ),
    Fault(
        "a bounded step forgets the gradient's weight",
        (("gradients, gradients, (1 - beta2) * factor**2)", "gradients, gradients, factor**2)"),),
        ("test_bounded_adam_operator_is_the_update_without_its_history",),
    ),
    Fault(
        "Muon's operator takes the momentum's weight without Nesterov",
        (("kappa = (1 - (mu**2 if group[", "kappa = (1 - (mu if group["),),
        ("test_the_operator_is_the_derivative_of_the_optimizers_own_step",),
    ),
    Fault(
        "directional scoring measures uphill",
        (
            (
                "return (behind - ahead) / 2, behind, ahead",
                "return (ahead - behind) / 2, behind, ahead",
            ),
            (
                "return (backend.losses(candidates, **passes) - ahead) / 2",
                "return (ahead - backend.losses(candidates, **passes)) / 2",
            ),
            ("return (losses() - ahead) / (2 * epsilon)", "return (ahead - losses()) / (2 * epsilon)"),
        ),
        ("test_the_sign_says_following_the_proxy_lowers_the_loss",),
    ),
    Fault(
        "a sketch has no signs",
        (("((bits & 1) * 2 - 1).to(torch.int8)", "((bits & 1) * 0 + 1).to(torch.int8)"),),
        (
            "test_countsketch_ranks_like_the_exact_alignment_of_its_layers",
            "test_countsketch_is_unbiased_over_seeds_in_alignment_and_gram",
        ),
    ),
    Fault(
        "the running proxy gradient is biased towards zero",
        (("Scaled(average, 1 / (1 - self._decay**count))", "Scaled(average, 1.0)"),),
        (
            "test_a_proxy_gradient_s_weight_halves_in_training_steps",
            "test_the_running_proxy_gradient_is_a_weighted_mean",
        ),
    ),
    Fault(
        "a utility that is not a number may be picked",
        (("usable = values.isfinite()\n", "usable = torch.ones_like(values, dtype=torch.bool)\n"),),
        ("test_a_nan_candidate_is_never_picked",),
    ),
    Fault(
        "of equal utilities the larger id comes first",
        (
            (
                "torch.argsort(scores, descending=True, stable=True)",
                "torch.argsort(scores, stable=True).flip(0)",
            ),
        ),
        ("test_top_k_takes_the_smaller_id_of_equal_utilities",),
    ),
    Fault(
        "a redundancy term takes off the overlap of the pick before",
        (("at = int(order[best])", "at = int(order[picked[0]])"),),
        ("test_exact_redundancy_follows_the_formula", "test_greats_is_greedy_by_raw_gradients_less_their_overlap"),
    ),
    Fault(
        "spikes in a row are forgotten over a resume",
        (
            (
                'self.skipped, self._spikes = state["skipped"], state["spikes"]',
                'self.skipped, self._spikes = state["skipped"], 0',
            ),
        ),
        ("test_it_goes_on_to_the_last_bit",),
    ),
    Fault(
        "the predictor's new scores are forgotten over a resume",
        (('self._unfitted = int(state["unfitted"])', "self._unfitted = 0"),),
        ("test_state_goes_through_json_and_on_to_the_last_bit",),
    ),
    Fault(
        "a buffer of weighted domains counts places from the run's start",
        (("first = (buffer - self._starts[stage]) * self._per_buffer", "first = buffer * self._per_buffer"),),
        ("test_places_of_each_domain_are_counted_without_a_gap",),
    ),
    Fault(
        "the learning rate reaches its floor a step late",
        (("span = max(1, total_steps - 1 - config.warmup_steps)", "span = max(1, total_steps - config.warmup_steps)"),),
        ("test_schedules",),
    ),
    Fault(
        "columns by which the vocabulary is padded count",
        (("        output[0][..., own:] = -math.inf\n", "        output[0][..., own:] = 0.0\n"),),
        ("test_every_number_is_that_of_an_unpadded_vocabulary[one]",),
    ),
    Fault(
        "pipeline stages draw the same dropout masks",
        (("part = (mesh.pp_rank * mesh.shape.dp + mesh.dp_rank)", "part = mesh.dp_rank"),),
        ("test_masks_differ_where_the_numbers_do[tp2-sp-pp2]",),
    ),
    Fault(
        "documents of a sequence see each other",
        (("(keys_T >= starts_BS[:, None, :, None])", "(starts_BS >= 0)[:, None, :, None]"),),
        ("test_a_document_in_a_sequence_is_as_one_alone",),
    ),
    Fault(
        "a masked token counts in the loss",
        (("    mask = tokens[:, 1:] >= 0\n", "    mask = torch.ones_like(tokens[:, 1:]) > 0\n"),),
        ("test_a_masked_token_is_context_alone",),
    ),
    Fault(
        "a token counts whose characters are beside a range",
        (("counted[first + 1 : last + 1] = 1", "counted[first:last] = 1"),),
        ("test_tokens_with_a_character_in_a_range_count",),
    ),
    Fault(
        "rotary frequencies are not scaled",
        (("    if model.rope_scaling.factor is not None:\n", "    if model.rope_scaling.factor == 0:\n"),),
        ("test_logits_are_those_of_transformers",),
    ),
    Fault(
        "groups share their picks",
        (
            (
                "    if (groups := buffer.groups(among)) is not None:\n        share",
                "    if (groups := None) is not None:\n        share",
            ),
        ),
        ("test_each_group_chooses_as_if_it_were_alone",),
    ),
    Fault(
        "a gradient is made of judges too",
        (("return batch if judges is None else batch.take((~judges).nonzero().flatten())", "return batch"),),
        ("test_no_gradient_is_made_of_judges_and_they_are_scored_beside_the_candidates",),
    ),
    Fault(
        "losses of one rank are taken for utilities of the next",
        (("utilities.view(backend.world_size, 2, -1).unbind(1)", "utilities.view(2, backend.world_size, -1)"),),
        ("test_picks_are_those_of_one_process[dp2-odds]",),
    ),
)


def place(fault: Fault, package: Path) -> None:
    """Put a fault into the package. Raises LookupError unless its text stands there once."""
    sources = {path: path.read_text() for path in package.rglob("*.py")}
    for before, after in fault.changes:
        found = [path for path, text in sources.items() if before in text]
        if len(found) == 1 and sources[found[0]].count(before) == 1:
            found[0].write_text(sources[found[0]].replace(before, after))
            return
    raise LookupError(f"{fault.name}: its text does not stand once in {package}")


def tests_of(fault: Fault, tree: Path) -> list[str]:
    """Say what pytest is told to run. Raises LookupError if no test has one of the names."""
    found = []
    for name in fault.tests:
        function, bracket, case = name.partition("[")
        for path in sorted((tree / "tests").rglob("test_*.py")):
            if f"def {function}(" in path.read_text():
                found.append(f"{path.relative_to(tree)}::{function}{bracket}{case}")
    if not found:
        raise LookupError(f"{fault.name}: no test of the name {' or '.join(fault.tests)}")
    return found


@contextmanager
def tree_of(commit: str) -> Iterator[Path]:
    """A copy of the files of a commit, gone after."""
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(["git", "archive", commit], cwd=ROOT, check=True, capture_output=True).stdout
        subprocess.run(["tar", "-x", "-C", folder], input=archive, check=True)
        yield Path(folder)


def outcome(tree: Path, tests: list[str]) -> int:
    """pytest's exit status: 0 passed, 1 failed, others: it could not run them."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True).returncode


def main() -> int:
    """Try every fault; print a line each and return how many were missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--commit", default="HEAD", help="whose package and tests are tried (default: %(default)s)")
    parser.add_argument("--only", default="", metavar="WORD", help="faults whose name contains it")
    args = parser.parse_args()
    missed = 0
    tried = [fault for fault in FAULTS if args.only in fault.name]
    with tree_of(args.commit) as tree:
        everything = sorted({test for fault in tried for test in tests_of(fault, tree)})
        if outcome(tree, everything) != 0:
            print("the tests do not pass without a fault: nothing was tried")
            return len(tried)
    for number, fault in enumerate(tried, 1):
        started = time.monotonic()
        with tree_of(args.commit) as tree:
            place(fault, tree / "megaopus")
            caught = outcome(tree, tests_of(fault, tree)) == 1
        missed += not caught
        verdict = "caught" if caught else "MISSED"
        print(f"{number:>2}/{len(tried)} {verdict} in {time.monotonic() - started:.0f} s: {fault.name}", flush=True)
    print(f"{len(tried) - missed} of {len(tried)} caught in {args.commit}")
    return missed


if __name__ == "__main__":
    sys.exit(main())
