"""The check verb, the arithmetic behind it, the command line and the launcher."""

import io
import json
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from megaopus.__main__ import main
from megaopus.cli.check import show
from megaopus.cli.main import verbs
from megaopus.config.compose import compose, default_config_dir
from megaopus.config.run_config import RunConfig
from megaopus.corpus_tools.prepare import Source, prepare
from megaopus.corpus_tools.split import SplitRule
from megaopus.data.corpus import Corpus
from megaopus.distributed.config import ParallelConfig
from megaopus.distributed.mesh import Mesh
from megaopus.errors import ConfigError
from megaopus.models.config import ModelConfig
from megaopus.models.flops import (
    count_parameters,
    count_rank_parameters,
    layer_weights,
    padded_vocab,
    training_flops_per_token,
)
from megaopus.planning import estimate as check
from megaopus.planning import scorer_cost
from megaopus.planning.scorer_cost import ScorerCost
from megaopus.selection.config import PrescreenConfig
from tests.harness import tiny_engine

ROOT = Path(__file__).resolve().parents[2]
GPT2 = ModelConfig(num_layers=2, hidden_size=32, num_heads=4)
LLAMA = ModelConfig(
    num_layers=2,
    hidden_size=32,
    num_heads=4,
    num_kv_heads=2,
    position="rope",
    norm="rmsnorm",
    activation="swiglu",
    bias=False,
    tied=False,
)
SHAPES = {
    "gpt2": GPT2,
    "gpt2_untied_longer_table": replace(GPT2, tied=False, max_positions=40),
    "llama": LLAMA,
    "qwen3": replace(LLAMA, qk_norm=True, tied=True, head_dim=16, ffn_hidden_size=96),
    "no_positions_biased_swiglu": replace(GPT2, position="none", activation="swiglu"),
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("check")
    with (folder / "texts.jsonl").open("w") as file:
        for index in range(120):
            words = " ".join(f"word{(index * 7 + place) % 50}" for place in range(80))
            file.write(json.dumps({"text": words, "id": str(index), "domain": ("docs", "code")[index % 2]}) + "\n")
    rule = SplitRule(proxy_fraction=0.2, validation_fraction=0.2, wanted=("docs",))
    source, console = [Source.parse(str(folder / "texts.jsonl"))], Console(file=io.StringIO())
    return prepare(source, folder / "corpus", vocab_size=300, rule=rule, console=console)


# -- parameters and FLOPs ----------------------------------------------------------------------------------------------


def built_parameters(parallel, models):
    """Parameters of this rank's part of each model, as megatron builds it."""
    mesh = Mesh(parallel, "cpu")
    try:
        engines = [tiny_engine(mesh, model=model, parallel=parallel, vocab_size=150, seq_len=24) for model in models]
        return [sum(parameter.numel() for parameter in engine.module.parameters()) for engine in engines]
    finally:
        mesh.close()


@pytest.mark.parametrize("shape", SHAPES)
def test_parameter_count_is_that_of_the_built_model(shape):
    assert built_parameters(ParallelConfig(), [SHAPES[shape]]) == [count_parameters(SHAPES[shape], 150, 24)]


def test_parameters_per_rank_are_those_of_the_built_stages(pool):
    models = [GPT2, LLAMA]
    for rank, built in enumerate(pool.run(4, built_parameters, ParallelConfig(tp=2, pp=2), models)):
        expected = [count_rank_parameters(model, 150, 24, tp=2, pp=2, stage=rank // 2) for model in models]
        assert built == expected, f"rank {rank}"


def test_padding_is_the_same_at_every_layout():
    assert [padded_vocab(size) for size in (1, 128, 129, 50257)] == [128, 128, 256, 50304]
    assert count_parameters(GPT2, 150, 24) == count_parameters(GPT2, padded_vocab(150), 24)


def test_training_flops_are_six_per_matrix_weight_and_the_attention():
    blocks = 2 * (4 * 32 * 32 + 2 * 4 * 32 * 32)
    assert sum(weight.numel for weight in layer_weights(GPT2) if weight.matrix) * 2 == blocks
    assert training_flops_per_token(GPT2, 128, 64) == 6 * (blocks + 128 * 32) + 12 * 2 * 32 * 64


# -- what check derives ------------------------------------------------------------------------------------------------


def small(**selection):
    config = RunConfig()
    config.train.global_batch_size = 16
    for key, value in selection.items():
        setattr(config.selection, key, value)
    return config


def test_overhead_follows_the_cost_model():
    # (N/K)(L_score/L_train)(2/3) + P/K, with N/K = 4, L_score/L_train = 1/4, P/K = 1/2
    config = small(method="opus", rho=0.25, score_length=64, proxy_batch_size=8)
    assert check.scoring_overhead(config) == pytest.approx(4 * 0.25 * 2 / 3 + 0.5)
    config.selection.estimator = "countsketch"
    assert check.scoring_overhead(config) == pytest.approx(4 * 0.25 + 0.5)
    assert check.scoring_overhead(small(method="high_ppl")) == pytest.approx(2 / 3)
    assert check.scoring_overhead(small(method="high_ppl", score_length=512)) == pytest.approx(2 / 3)  # of 256
    # a Gram matrix takes a pass of its own, or shares adjoint's: forward, input gradients, Q, per-sequence gradients
    config = small(method="opus", rho=0.25, score_length=64, proxy_batch_size=8, redundancy=1.0)
    assert check.scoring_overhead(config) == pytest.approx(2 / 3 + 1 + 0.5)
    config.selection.estimator = "adjoint"
    assert check.scoring_overhead(config) == pytest.approx(1 + 1 / 3 + 0.5)
    assert check.scoring_overhead(small()) == 0
    # a quarter of the proxy is scored beside the candidates, and makes no gradient
    plain = check.scoring_overhead(small(method="opus", prescreen=PrescreenConfig(mode="importance")))
    judged = small(method="opus", utilities="odds", prescreen=PrescreenConfig(mode="importance"))
    share = judged.selection.proxy_batch_size / 4 / judged.train.global_batch_size
    assert check.scoring_overhead(judged) == pytest.approx(plain - share + share * 2 / 3)


def test_omega_is_that_of_its_formula():
    """r l (c/3) s / u + upkeep: what online scoring and a column cost beside training."""
    config = small(method="opus", rho=0.25, score_length=64, proxy_batch_size=8, score_every=2, warmup_steps=250)
    config.train.steps = 1000
    found = scorer_cost.online(config)
    assert (found.ratio, found.length, found.forwards, found.size, found.uses) == (8, 0.25, pytest.approx(2), 1, 2)
    assert found.omega == pytest.approx(8 * 0.25 * (2 / 3) / 2 + 8 / 2 / 16)  # the proxy too every other step
    assert found.of_run == pytest.approx(0.75 * found.omega)  # 250 of 1,000 steps score nothing
    itself = ScorerCost(ratio=2, length=1 / 4, forwards=2)
    companion = ScorerCost(ratio=8, length=1 / 2, forwards=4, size=30 / 1500)
    assert (itself.omega, companion.omega) == (pytest.approx(1 / 3), pytest.approx(0.11, abs=0.01))
    told = ScorerCost(ratio=3, forwards=2, upkeep=0.5, share=0.5).told()
    assert "omega 2.5 = r 3 x l 1 x c/3 0.667 x s 1 / u 1 + upkeep 0.5, in 50% of the steps" in told
    assert "time_ratio = tokens_ratio x 2.25: pays if it needs less than 0.4444 of the tokens" in told


def test_check_tells_when_a_column_pays(corpus, capsys):
    """The corpus is read once, by two forwards, with the proxy's gradient of 64 sequences; here for two updates."""
    settings = ["data.seq_len=64", "train.steps=2", "selection=opus_exact", "data.target_domains=[docs]"]
    settings += ["selection.warmup_steps=0", "train.global_batch_size=16"]
    tokens = int(Corpus.open(corpus).lengths.sum())
    assert main(["check", f"data.path={corpus}", *settings, "--scorer-parameters", "2K"]) == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    config = compose([f"data.path={corpus}", *settings])
    own = count_parameters(config.model, Corpus.open(corpus).vocab_size, 64)
    for size in (1.0, 2000 / own):
        omega = tokens / (2 * 16 * 64) * (2 / 3) * size + size * 64 / 32
        assert f"omega {omega:.3g} = r {tokens / 2048:.3g} x l 1 x c/3 0.667 x s {size:.3g}" in text
    assert "online (opus) omega" in text
    assert "ahead of time, by 2,000 parameters" in text
    assert "a column is of every document of the corpus, whole, and serves this run alone" in text
    with pytest.raises(SystemExit):
        main(["check", "--scorer-parameters", "many"])
    assert "many: not a number of parameters, as 125M or 1.5B" in capsys.readouterr().err


def test_groups_are_meshes_of_adjacent_tensor_parallel_ranks():
    assert check.groups(ParallelConfig(tp=2, pp=2), 8) == {
        "tp": [[0, 1], [2, 3], [4, 5], [6, 7]],
        "pp": [[0, 4], [1, 5], [2, 6], [3, 7]],
        "dp": [[0, 2], [1, 3], [4, 6], [5, 7]],
        "cp": [[rank] for rank in range(8)],
    }
    assert check.groups(ParallelConfig(tp=2, cp=2), 8) == {
        "tp": [[0, 1], [2, 3], [4, 5], [6, 7]],
        "cp": [[0, 2], [1, 3], [4, 6], [5, 7]],
        "dp": [[0, 4], [1, 5], [2, 6], [3, 7]],
        "pp": [[rank] for rank in range(8)],
    }
    of_experts = check.groups(ParallelConfig(tp=2, ep=2, sequence_parallel=True), 8)
    assert of_experts["ep"] == [[0, 1], [2, 3], [4, 5], [6, 7]]  # each expert is whole
    assert of_experts["expert_dp"] == [[0, 2, 4, 6], [1, 3, 5, 7]]


def printed(overrides, corpus, world_size=None):
    console = Console(file=io.StringIO(), width=200)
    overrides = [f"data.path={corpus}", *overrides]
    show(compose(overrides, world_size=world_size), world_size, overrides, console=console)
    return console.file.getvalue()


def test_a_length_beyond_the_sequence_scores_all_of_it_and_check_says_so(corpus):
    text = printed(["selection=opus_paper", "data.seq_len=64", "data.target_domains=[docs]"], corpus, 1)
    assert "64 of 64 of each candidate, whole sequences (score_length = 512)" in text
    text = printed(["selection=opus_paper", "data.seq_len=1024", "data.target_domains=[docs]"], corpus, 1)
    assert "512 of 1024 of each candidate" in text


def test_check_prints_what_a_run_would_be(corpus):
    text = printed(
        ["selection=opus_exact", "data.seq_len=64", "run_dir='runs/a, b'", "data.target_domains=[docs]"], corpus, 4
    )
    for line in (
        "4 = 4 ranks / (tp 1 x cp 1 x pp 1)",
        "64, of which 32 are picked",
        "16 on each rank at most, found from free memory at the first scored step",
        "2,048 per step, 2,048,000 in all",
        "about 1.0 MiB: 64,000 rows, all candidates of every step",
        "MiB each, at most 3 at a time",
        "8 sequences per step, 25.0% of the update tokens",
        "expected overhead │ 158.3%",
        "90% (not in the warm-up of 100 steps)",
        "│ 'opus'  (default 'uniform')",
        "Memory per rank in fp32",
        "Memory per rank in bf16",
    ):
        assert line in text, line
    command = f"torchrun --nproc-per-node 4 -m megaopus train data.path={corpus} selection=opus_exact data.seq_len=64"
    assert command in text
    pasted = shlex.split(text.rstrip().rsplit("\n", 1)[1])  # what a shell makes of it
    assert pasted[-2:] == ["run_dir='runs/a, b'", "data.target_domains=[docs]"]


@pytest.mark.parametrize("name", sorted(path.stem for path in (default_config_dir() / "selection").glob("*.yaml")))
def test_every_selection_has_its_expected_cost(name, corpus):
    text = printed([f"selection={name}", "data.seq_len=64", "data.target_domains=[docs]"], corpus)
    expected = {
        "uniform": "none (uniform)",
        "dsir": "expected overhead │ 0.0%",
        "importance": "expected overhead │ 0.0%",
    }
    # 32 candidates at 2/3 of a token and 8 + 8 sequences for the gradients every 32 steps, over 32 sequences
    expected["screened"] = f"expected overhead │ {(32 * 2 / 3 + 16) / 32 / 32:.1%}"
    # 64 candidates and 4 judges at 2/3 of a token, and 12 + 16 sequences for the gradients every 8 steps, over 32
    expected["opus"] = f"expected overhead │ {(68 * 2 / 3 + 28 / 8) / 32:.1%}"
    assert expected.get(name, "expected overhead │") in text


def test_check_of_a_model_parallel_layout(corpus):
    text = printed(["data.seq_len=64", "parallel=tp2_pp2", "engine=cpu"], corpus)
    for line in ("each rank of stage 0", "each rank of stage 1", "[0, 1] [2, 3]", "Memory per rank in fp32, stage 0"):
        assert line in text, line
    assert "bf16" not in text.replace("also under bf16", "")
    assert "torchrun --nproc-per-node 4" in text


def test_check_refuses_what_does_not_fit_the_ranks(corpus):
    with pytest.raises(ConfigError, match="3 ranks are not a multiple"):
        show(compose([f"data.path={corpus}", "parallel=tp2", "data.seq_len=64"]), 3)


def test_the_launch_command_is_for_real_nodes(corpus):
    def last_lines(*arguments, **options):
        console = Console(file=io.StringIO(), width=200)
        overrides = [f"data.path={corpus}", "data.seq_len=64", "train.global_batch_size=512", *arguments]
        show(compose(overrides, world_size=64), 64, overrides, console=console, **options)
        return console.file.getvalue().rstrip().rsplit("\n", 2)[1:]

    where, command = last_lines()
    assert where.startswith("Start it on each of 8 nodes, NODE_RANK from 0 to 7, MASTER_ADDR the first one's name")
    place = '--node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port 29500'
    assert command.startswith(f"  torchrun --nnodes 8 --nproc-per-node 8 {place} -m megaopus train data.path=")
    assert last_lines(per_node=4)[1].startswith("  torchrun --nnodes 16 --nproc-per-node 4 ")
    where, command = last_lines("engine=cpu")  # on one node there
    assert where == "Start it with:"
    assert command.startswith("  torchrun --nproc-per-node 64 -m megaopus train ")


@pytest.mark.parametrize(
    ("ranks", "per_node", "on_cpu", "expected"),
    [
        (1, 8, False, (1, 1)),
        (8, 8, False, (1, 8)),
        (16, 8, False, (2, 8)),
        (12, 8, False, (2, 6)),
        (64, 8, True, (1, 64)),
    ],
)
def test_ranks_are_laid_out_on_equal_nodes(ranks, per_node, on_cpu, expected):
    assert check.nodes_of(ranks, per_node, on_cpu) == expected


@pytest.mark.parametrize(
    ("module", "override", "said"),
    [
        ("deepspeed", "engine=deepspeed", "engine.name=deepspeed, but deepspeed cannot be imported"),
        ("pytorch_optimizer", "optim=lion", "optim.name=lion, but pytorch_optimizer cannot be imported"),
    ],
)
def test_check_says_what_the_run_would_be_refused_for(module, override, said, corpus, capsys, monkeypatch):
    arguments = ["check", f"data.path={corpus}", "data.seq_len=64", "engine.device=cpu", override]
    monkeypatch.setitem(sys.modules, module, None)  # an import of it fails
    assert main(arguments) == 2
    text = capsys.readouterr().out
    assert "The run would be refused here: " in text
    assert said in text
    assert text.index(said) < text.index("Start it with:")


# -- command line ------------------------------------------------------------------------------------------------------


def test_check_from_the_command_line(corpus, capsys):
    assert main(["check", f"data.path={corpus}", "--world-size", "2", "data.seq_len=64"]) == 0
    assert "Start it with:" in capsys.readouterr().out


def test_settings_alone_are_checked_with_and_without_their_corpora(corpus, capsys):
    checked = ["check", "--world-size", "4", "train.global_batch_size=32"]
    assert main([*checked, "--settings-only", f"data.path={corpus}"]) == 0
    assert capsys.readouterr().out == "the settings fit 4 rank(s)\n"
    assert main([*checked, "--settings-only", "data.path=elsewhere"]) == 2
    assert "data.path = 'elsewhere': no such folder" in capsys.readouterr().err
    assert main([*checked, "--no-corpora", "data.path=elsewhere"]) == 0
    assert main([*checked, "--no-corpora", "data.path=elsewhere", "train.global_batch_size=30"]) == 2
    assert "train.global_batch_size = 30: cannot be shared evenly by dp = 4 ranks" in capsys.readouterr().err


def test_errors_are_one_message_and_exit_code_2(capsys, monkeypatch):
    assert main(["train", "+optim.lrr=1"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: 2 problems in the configuration (nothing was written):")
    assert "did you mean optim.lr?" in err
    assert "Traceback" not in err
    monkeypatch.setenv("MEGAOPUS_TRACEBACK", "1")
    with pytest.raises(ConfigError):
        main(["train", "+optim.lrr=1"])


def test_one_rank_of_each_node_speaks_and_all_fail(capsys, monkeypatch):
    monkeypatch.setattr("megaopus.cli.main.GRACE_SECONDS", 0)
    for name, value in (("WORLD_SIZE", "4"), ("MASTER_ADDR", "localhost"), ("MASTER_PORT", "29500")):
        monkeypatch.setenv(name, value)
    spoke = {}
    for rank, local_rank in ((0, 0), (1, 1), (2, 0), (3, 1)):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(local_rank))
        assert main(["train", "lr=1"]) == 2
        spoke[rank] = bool(capsys.readouterr().err)
    assert spoke == {0: True, 1: False, 2: True, 3: False}


def test_the_paper_experiment_passes_at_any_dp_that_divides_its_batch(corpus, capsys):
    short = ["experiment=paper_gpt2_xl_muon", f"data.path={corpus}", "data.seq_len=64", "selection.score_length=64"]
    for dp in (1, 2, 4, 8, 16, 32):
        compose(short, world_size=dp)
    assert main(["check", *short, "--world-size", "32"]) == 0
    assert "32 = 32 ranks" in capsys.readouterr().out
    for ranks, remedy in ((6, "launch 4 or 8 processes"), (33, "launch 32 processes")):
        assert main(["check", *short, "--world-size", str(ranks)]) == 2
        assert "1 problem" in (said := capsys.readouterr().err)
        assert f"train.global_batch_size = 32: cannot be shared evenly by dp = {ranks} ranks\n    -> {remedy}" in said


def test_the_world_size_comes_from_the_environment(corpus, capsys, monkeypatch):
    for name, value in launched(3).items():
        monkeypatch.setenv(name, value)
    assert main(["train", f"data.path={corpus}", "data.seq_len=64"]) == 2
    assert "evenly by dp = 3 ranks" in capsys.readouterr().err


def launched(size, **more):
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(size)}
    return {**place, "MASTER_ADDR": "localhost", "MASTER_PORT": "29500", **more}


LEFT_OVER = {  # environment: what is said of it
    "MASTER_ADDR=localhost": "RANK, LOCAL_RANK, WORLD_SIZE, MASTER_PORT missing",
    "RANK=0": "LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT missing",
    "RANK=1": "LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT missing",
    "LOCAL_RANK=3": "RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT missing",
    "LOCAL_WORLD_SIZE=8": "RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT missing",
    "RANK=1 WORLD_SIZE=2": "LOCAL_RANK, MASTER_ADDR, MASTER_PORT missing",
}


@pytest.mark.parametrize("given", LEFT_OVER)
def test_what_a_launcher_left_over_is_named(given, corpus, capsys, monkeypatch):
    for text in given.split():
        monkeypatch.setenv(*text.split("="))
    assert main(["train", f"data.path={corpus}"]) == 2
    said = capsys.readouterr().err
    assert f"environment = '{given}': left over, or {LEFT_OVER[given]}: a launcher sets all of them" in said
    assert f"for one process unset {' '.join(text.split('=')[0] for text in given.split())};" in said


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("WORLD_SIZE", "many", "is not a number"),
        ("RANK", "2", "not below WORLD_SIZE = 2"),
        ("MASTER_PORT", "x", "is not"),
    ],
)
def test_a_launcher_s_nonsense_is_refused(name, value, reason, corpus, capsys, monkeypatch):
    for variable, text in launched(2, **{name: value}).items():
        monkeypatch.setenv(variable, text)
    assert main(["train", f"data.path={corpus}"]) == 2
    assert f"environment {name} = '{value}': {reason}" in capsys.readouterr().err


@pytest.mark.parametrize("verb", verbs())
def test_each_verb_has_help_with_examples(verb, capsys):
    with pytest.raises(SystemExit) as caught:
        main([verb, "--help"])
    assert caught.value.code == 0
    assert f"examples:\n  python -m megaopus {verb}" in capsys.readouterr().out


def test_help_is_light():
    code = (
        "import sys, megaopus.cli.main as m\n"
        "for arguments in (['--help'], *([verb, '--help'] for verb in m.verbs())):\n"
        "    try: m.main(arguments)\n"
        "    except SystemExit: pass\n"
        "heavy = {'torch', 'megatron', 'matplotlib', 'wandb'} & set(sys.modules)\n"
        "sys.exit(f'--help imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_every_verb_is_listed_with_what_it_does(capsys):
    assert set(verbs()) >= {"check", "demo", "prepare", "proxy", "report", "score", "train"}
    with pytest.raises(SystemExit):
        main(["--help"])
    listed = capsys.readouterr().out
    for name in verbs():
        assert re.search(rf"^  {name} +[A-Z].+\.$", listed, re.MULTILINE), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check", "--world-size", "0"], "megaopus check: error: --world-size must be at least 1"),
        (["report", "a", "--replay", "1", "--out", "b"], "megaopus report: error: --replay writes no page: leave"),
        (["demo", "here"], "megaopus demo: error: unrecognized arguments: here"),
    ],
)
def test_wrong_usage_ends_with_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_an_unknown_verb_names_the_verbs(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["trian"])
    assert caught.value.code == 2
    assert "choose from" in capsys.readouterr().err
