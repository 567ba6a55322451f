"""Bad settings: each is refused with its key, why, and what to do; all of them in one list."""

import json

import pytest

from megaopus.config.compose import compose
from megaopus.errors import ConfigError
from tests.unit.config_corpus import write_manifest


@pytest.fixture
def corpus(tmp_path):
    return write_manifest(tmp_path / "corpus")


def problems(overrides, corpus, world_size=1, **kwargs):
    with pytest.raises(ConfigError) as caught:
        compose([f"data.path={corpus}", *overrides], world_size=world_size, **kwargs)
    return caught.value


MISTAKES = {
    # override: (key, part of the reason, part of the remedy)
    "selection.temprature=1": ("selection.temprature = 1", "no such setting", "did you mean selection.temperature?"),
    "+selection.temprature=1": ("selection.temprature = 1", "no such setting", "did you mean selection.temperature?"),
    "++selection.temprature=1": ("selection.temprature = 1", "no such setting", "did you mean selection.temperature?"),
    "lr=0.1": ("lr = 0.1", "no such setting", "did you mean optim.lr?"),
    "modle=tiny": ("modle = 'tiny'", "no such setting", "did you mean model?"),
    "quux.zork=1": (
        "quux.zork = 1",
        "no such setting",
        "settings there: run_dir, seed, resume, resume_allow, plugins, model",
    ),
    "optim.betas.zork=0.5": ("optim.betas.zork = 0.5", "no such setting", "did you mean optim.betas?"),
    "model=gtp2_small": (
        "model = 'gtp2_small'",
        "no such choice",
        "did you mean model=gpt2_small? choices: gpt2_large",
    ),
    "model=gtp2": ("model = 'gtp2'", "no such choice", "did you mean model=gpt2"),
    "experiment=paper": ("experiment = 'paper'", "no such choice", "paper_gpt2_xl_muon"),
    "model={num_layers: 2}": ("model = {'num_layers': 2}", "no such choice", "choices: gpt2_large"),
    "train.steps=abc": ("train.steps = 'abc'", "must be an integer, not str", "train.steps=100"),
    "train.steps=1.5": ("train.steps = 1.5", "must be an integer, not float", "train.steps=100"),
    "seed=true": ("seed = True", "must be an integer, not bool", "seed=1234"),
    "optim.lr=fast": ("optim.lr = 'fast'", "must be a finite number", "optim.lr=0.001"),
    "optim.lr=nan": ("optim.lr = nan", "must be a finite number", "optim.lr=0.001"),
    "optim.betas=3": ("optim.betas = 3", "must be a list, not int", "optim.betas=[0.9,0.95]"),
    "optim.betas=[a,b]": ("optim.betas = ['a', 'b']", "each element must be a finite number", "optim.betas=[0.9,0.95]"),
    "optim.betas=[0.9]": ("optim.betas = [0.9]", "two numbers", "[0.9,0.95] is usual"),
    "data.target_domains=docs": (
        "data.target_domains = 'docs'",
        "must be a list, not str",
        "data.target_domains=[a,b]",
    ),
    "engine.recompute=1": ("engine.recompute = 1", "must be true or false", "engine.recompute=true"),
    "engine.deterministic=yes": ("engine.deterministic = 'yes'", "must be true or false", "engine.deterministic=true"),
    "logging.wandb=false": ("logging.wandb = False", "must be text, not bool", 'logging.wandb="text"'),
    "logging.wandb=null": ("logging.wandb = None", "must be text", 'logging.wandb="text"'),
    "train.steps=[1": ("train.steps = 'train.steps=[1'", "not an override", "write key=value"),
    "steps": ("steps = 'steps'", "not an override", "write key=value"),
    "~optim.lr": ("optim.lr = '~optim.lr'", "cannot be deleted", "optim.lr=VALUE"),
    "optim.lr=0.1,0.2": ("optim.lr = '0.1,0.2'", "a sweep", "one run takes one value"),
    "model@optim=tiny": ("model@optim = 'tiny'", "cannot be moved", "write model=NAME"),
    "run_dir=runs/${sede}": ("run_dir = 'runs/${sede}'", "'sede' not found", "${section.key}"),
    "optim=muon optim.settings.momentun=0.9": (
        "optim.settings.momentun = 0.9",
        "muon has no such setting",
        "did you mean momentum?",
    ),
    "optim=muon optim.settings.ns_steps=2.5": (
        "optim.settings.ns_steps = 2.5",
        "must be an integer, not float",
        "ns_steps=5",
    ),
    "optim=sgd optim.settings.nesterov=1": ("optim.settings.nesterov = 1", "must be true or false", "nesterov=false"),
    "optim=conda optim.settings.scale=0": ("optim.settings.scale = 0", "must be positive", "0.25 is usual"),
    "optim.settings.momentum=0.9": ("optim.settings.momentum = 0.9", "adamw has no such setting", "it has none"),
    "optim.name=adam": (
        "optim.name = 'adam'",
        "unknown choice",
        "did you mean adamw? use one of: adafactor, adamw, conda, lion, muon, namo",
    ),
    "selection.rho=0": ("selection.rho = 0.0", "must lie in (0, 1]", "0.5 picks half"),
    "resume_allow=[optim.rl]": ("resume_allow = 'optim.rl'", "no such setting", "did you mean optim.lr?"),
    "resume_allow=[seed]": ("resume_allow = 'seed'", "can never differ from the checkpoint's", "another run_dir"),
    "resume_allow=[logging.every]": ("resume_allow = 'logging.every'", "needs no permission", "leave it out"),
    "checkpoint.every=15 m": (
        "checkpoint.every = '15 m'",
        "neither a number of steps nor a time",
        "15m every 15 minutes",
    ),
    "checkpoint.every=0m": ("checkpoint.every = '0m'", "nor a time of nothing", "200 is every 200 steps"),
    "checkpoint.every=2.5": ("checkpoint.every = 2.5", "must be an integer", "15m"),
    "checkpoint.keep_every=-1": ("checkpoint.keep_every = -1", "must not be negative", "0 keeps the newest only"),
    "resume=atuo": ("resume = 'atuo'", "nor an existing checkpoint folder", "did you mean auto?"),
    "data.target_domains=[dosc]": (
        "data.target_domains = 'dosc'",
        "no domain of that name",
        "did you mean docs? domains: docs, code",
    ),
    "data.proxy_path=nowhere": ("data.proxy_path = 'nowhere'", "no such folder", "python -m megaopus prepare"),
    "model.vocab_size=300": ("model.vocab_size = 300", "token ids up to 499", "at least 500, or null"),
    "model.max_positions=100": ("model.max_positions = 100", "shorter than data.seq_len = 256", "model.position=rope"),
    "optim.warmup_steps=1001": ("optim.warmup_steps = 1001", "longer than train.steps = 1000", "at most 1000"),
    "train.micro_batch_size=6": (
        "train.global_batch_size = 32",
        "dp x micro_batch_size = 1 x 6",
        "micro_batch_size that divides 32",
    ),
    "parallel.cp=0": ("parallel.cp = 0", "must be at least 1", "1 switches"),
    "parallel.vpp=2": ("parallel.vpp = 2", "needs pp > 1", "set parallel.pp"),
    "selection.prescreen=predict": ("selection.prescreen = 'predict'", "no such", "mean selection.prescreen.mode?"),
    "selection.prescreen.mode=on": (
        "selection.prescreen.mode = 'on'",
        "unknown choice",
        "importance, cascade, predict",
    ),
    "selection.prescreen.slices=4": ("selection.prescreen.slices = 4", "no such", "selection.prescreen.slice?"),
    "selection.prescreen.text_features=[words]": (
        "selection.prescreen.text_features = ['words']",
        "unknown",
        "ngrams, domain",
    ),
    "selection.prescreen.window=8": ("selection.prescreen.window = 8", "at least 64", "1024 is usual"),
    "selection.guards.domain_floor=2": ("selection.guards.domain_floor = 2.0", "must lie in [0, 1]", "0 switches"),
    "selection.guards.exposure_cap=-1": ("selection.guards.exposure_cap = -1", "not be negative", "0 lifts the cap"),
    "selection.proxy_every=0": ("selection.proxy_every = 0", "at least 1", "docs/selection.md"),
    "selection.rho=0.3": ("selection.rho = 0.3", "106.67 candidates", "0.299065 (107 candidates)"),
}


@pytest.mark.parametrize("override", MISTAKES)
def test_each_mistake_names_key_reason_and_remedy(override, corpus):
    key, reason, remedy = MISTAKES[override]
    error = problems(override.split() if override.startswith("optim=") else [override], corpus)
    first, second = str(error.problems[0]).split("\n")
    assert first.startswith(key)
    assert reason in first
    assert remedy in second
    assert len(error.problems) == 1, error


COMBINED = [
    # what is wrong only together: overrides, ranks, key, reason, remedy
    (
        "parallel.tp=3 model.ffn_hidden_size=384 model.vocab_size=768",
        3,
        "model.num_heads = 4",
        "parallel.tp = 3",
        "parallel.tp that divides 4",
    ),
    (
        "parallel.tp=3 model.ffn_hidden_size=384 model.num_heads=6 model.head_dim=8",
        3,
        "parallel.tp = 3",
        "512 rows",
        "power of two",
    ),
    ("parallel.tp=2 model.num_kv_heads=1", 2, "model.num_kv_heads = 1", "over parallel.tp = 2", "tp that divides 1"),
    (
        "parallel.tp=2 model.ffn_hidden_size=77",
        2,
        "model.ffn_hidden_size = 77",
        "parallel.tp = 2",
        "tp that divides 77",
    ),
    ("parallel.pp=3", 3, "model.num_layers = 4", "over parallel.pp = 3 stages", "a parallel.pp that divides 4"),
    ("parallel.tp=2 parallel.pp=2", 6, "parallel.tp = 2", "6 ranks are not a multiple", "multiple of 4 processes"),
    ("", 3, "train.global_batch_size = 32", "evenly by dp = 3", "launch 2 or 4 processes"),
    ("", 64, "train.global_batch_size = 32", "evenly by dp = 64", "launch 32 processes"),
    ("parallel.tp=2", 12, "train.global_batch_size = 32", "dp = 6 ranks", "launch 8 or 16 processes, or change tp"),
    ("train.micro_batch_size=32", 2, "train.global_batch_size = 32", "2 x 32", "micro_batch_size that divides 16"),
    (
        "selection=opus selection.estimator=exact parallel.tp=2",
        2,
        "selection.estimator = 'exact'",
        "needs tp = pp = cp = ep = 1",
        "adjoint or directional",
    ),
    (
        "selection=opus selection.estimator=exact model=gpt2_small",
        1,
        "selection.estimator = 'exact'",
        "float64",
        "directional",
    ),
    ("selection=opus_exact selection.warmup_steps=1001", 1, "selection.warmup_steps", "nothing would ever", "fewer"),
    (
        "selection=opus_exact selection.warmup_steps=1000",
        1,
        "selection.warmup_steps",
        "step 1000, train.steps",
        "fewer",
    ),
    (
        "selection=opus_exact selection.warmup_steps=0 selection.score_every=1000",
        *(1, "selection.score_every = 1000", "in step 0 alone, when adamw has no state yet", "use fewer"),
    ),
    ("selection=opus_exact selection.score_length=1", 1, "selection.score_length = 1", "at least 2", "predicts no"),
    ("optim.schedule=wsd optim.warmup_steps=600 optim.decay_steps=600", 1, "optim.decay_steps = 600", "1200", "400"),
    (
        "parallel.tp=2 parallel.sequence_parallel=true data.seq_len=255",
        2,
        "data.seq_len = 255",
        "split",
        "use parallel.sequence_parallel=false",
    ),
    ("parallel.cp=3", 3, "data.seq_len = 256", "over parallel.cp = 3 ranks", "parallel.cp that divides 256"),
    (
        "parallel.cp=2 parallel.tp=2 parallel.sequence_parallel=true data.seq_len=254",
        4,
        "data.seq_len = 254",
        "parallel.cp = 2 x parallel.tp = 2 (sequence parallelism)",
        "use parallel.sequence_parallel=false",
    ),
    (
        "parallel.cp=4",
        6,
        "parallel.cp = 4",
        "6 ranks are not a multiple of tp x cp x pp = 4",
        "multiple of 4 processes",
    ),
    (
        "parallel.pp=2 parallel.vpp=3",
        2,
        "model.num_layers = 4",
        "parallel.vpp = 3 chunks",
        "x parallel.vpp that divides 4",
    ),
    (
        "parallel.pp=2 parallel.vpp=2 train.global_batch_size=24",
        2,
        "train.global_batch_size = 24",
        "makes 3 micro-batches",
        "use train.micro_batch_size=6, or parallel.vpp=1",
    ),
    (
        "parallel.distributed_optimizer=true optim.name=muon",
        2,
        "parallel.distributed_optimizer = True",
        "not of optim.name = muon",
        "optim.name=adamw",
    ),
    ("parallel.ep=2", 2, "parallel.ep = 2", "the model has no experts", "set model.num_experts, or 1"),
    ("model=moe_tiny parallel.ep=3", 4, "parallel.ep = 3", "does not divide model.num_experts = 8", "divides 8"),
    ("model=moe_tiny parallel.ep=4", 2, "parallel.ep = 4", "2 ranks of a stage are not a multiple", "more processes"),
    (
        "model=moe_tiny parallel.tp=2",
        2,
        "parallel.sequence_parallel = False",
        "ranks must share the tokens too",
        "to true",
    ),
    (
        "model=moe_tiny parallel.tp=2 parallel.sequence_parallel=true parallel.expert_tp=1",
        2,
        "parallel.expert_tp = 1",
        "is neither tp = 2",
        "leave it null",
    ),
    ("model=moe_tiny engine=deepspeed", 1, "engine.name = 'deepspeed'", "has no experts", "engine.name=megatron"),
    ("model=moe_tiny model.bias=true", 1, "model.bias = True", "experts have no biases", "model.bias=false"),
    ("model=moe_tiny model.experts_per_token=9", 1, "model.experts_per_token = 9", "above num_experts = 8", "fewer"),
    (
        "model=moe_tiny model.experts_per_token=1",
        1,
        "model.experts_per_token = 1",
        "learns nothing",
        "normalized=false",
    ),
    (
        "model=moe_tiny model.first_dense_layers=4",
        1,
        "model.first_dense_layers = 4",
        "no block with experts",
        "fewer than 4",
    ),
    (
        "model=moe_tiny model.router.bias_rate=0.001",
        1,
        "model.router.bias_rate = 0.001",
        "by softmax",
        "scores=sigmoid",
    ),
    (
        "model=moe_tiny selection=opus_exact selection.estimator=adjoint",
        1,
        "selection.estimator = 'adjoint'",
        "experts are given tokens of several",
        "estimator=directional",
    ),
    (
        "model=moe_tiny selection=opus_exact selection.layers=linear",
        1,
        "selection.layers = 'linear'",
        "experts are given tokens of several",
        "layers=all",
    ),
    (
        "model=moe_tiny selection=opus_exact selection.redundancy=0.5",
        1,
        "selection.gram = 'countsketch'",
        "experts are given tokens of several",
        "redundancy=0",
    ),
    (
        "model=moe_tiny selection=opus_exact selection.estimator=exact parallel.ep=2",
        2,
        "selection.estimator = 'exact'",
        "needs tp = pp = cp = ep = 1",
        "set parallel.ep=1",
    ),
    ("engine=deepspeed parallel.pp=2", 2, "parallel.pp = 2", "tensor and data parallelism only", "parallel.pp=1"),
    ("engine=deepspeed parallel.cp=2", 2, "parallel.cp = 2", "tensor and data parallelism only", "parallel.cp=1"),
    (
        "engine=deepspeed optim=conda",
        1,
        "optim.name = 'conda'",
        "needs whole tensors",
        "one of optim=adamw, lion, muon, sgd, or engine.name=megatron",
    ),
    (
        "engine=deepspeed optim=sophia_g",
        1,
        "optim.name = 'sophia_g'",
        "gradients of its own",
        "or engine.name=megatron",
    ),
    ("data.weights=[[0,{doc:1}]]", 1, "data.weights = ", "no sequence of domain doc in", "did you mean docs?"),
    ("data.weights=[[5,{docs:1}]]", 1, "data.weights = ", "the first stage begins at step 5", "data.weights=[[0,"),
    (
        "engine=deepspeed parallel.distributed_optimizer=true",
        2,
        "parallel.distributed_optimizer = True",
        "engine.zero_stage",
        "engine.name=megatron",
    ),
    (
        "engine=deepspeed engine.zero_stage=4",
        1,
        "engine.zero_stage = 4",
        "unknown choice",
        "1, 2, 3; without sharding: engine.name=megatron",
    ),
    (
        "engine=deepspeed engine.zero_stage=3 selection=opus selection.estimator=exact",
        1,
        "selection.estimator = 'exact'",
        "partitions them",
        "engine.zero_stage=2",
    ),
    (
        "engine.deterministic=true selection=opus selection.proxy_micro_batch_size=8",
        1,
        "selection.score_micro_batch_size = None",
        "the free memory",
        "selection.score_micro_batch_size=8",
    ),
    (
        "engine.deterministic=true selection=opus selection.score_micro_batch_size=8",
        1,
        "selection.proxy_micro_batch_size = None",
        "the free memory",
        "selection.proxy_micro_batch_size=8",
    ),
    ("selection.prescreen.mode=cascade", 1, "selection.prescreen.mode = 'cascade'", "no utilities", "method=opus"),
    ("selection.redundancy=1 selection=high_ppl", 1, "selection.redundancy", "no Gram matrix", "redundancy=0"),
    ("selection=opus selection.check_every=-1", 1, "selection.check_every", "negative", "switches the check off"),
    (
        "selection=opus_exact selection.contrast=true selection.check_every=5",
        1,
        "selection.check_every",
        "relative to the pool",
        "contrast=false",
    ),
    ("selection.check_every=5", 1, "selection.check_every", "method uniform predicts nothing", "check_every=0"),
]


@pytest.mark.parametrize(("overrides", "world_size", "key", "reason", "remedy"), COMBINED)
def test_settings_that_do_not_fit_together(overrides, world_size, key, reason, remedy, corpus):
    error = problems(overrides.split(), corpus, world_size)
    first, second = str(error.problems[0]).split("\n")
    assert first.startswith(key)
    assert reason in first
    assert remedy in second
    assert len(error.problems) == 1, error


def test_five_mistakes_of_different_kinds_come_back_together(corpus):
    overrides = [
        "+selection.temprature=1",
        "model=gtp2",
        "optim.betas=3",
        "selection.rho=2",
        "train.steps=[1",
        "resume=x",
    ]
    error = problems(overrides, corpus)
    keys = [problem.key for problem in error.problems]
    assert sorted(keys) == ["model", "optim.betas", "resume", "selection.rho", "selection.temprature", "train.steps"]
    assert str(error).startswith("6 problems in the configuration (nothing was written):")
    assert all(f"  {number}. " in str(error) for number in range(1, 7))


def test_a_refused_setting_raises_no_second_problem(corpus):
    # With steps unknown, whether 5000 warm-up steps are too many cannot be said.
    assert len(problems(["train.steps=abc", "optim.warmup_steps=5000"], corpus).problems) == 1
    assert len(problems(["train.stesp=9000", "optim.warmup_steps=5000"], corpus).problems) == 1
    assert len(problems(["model=gtp2_small", "parallel.pp=3"], corpus, world_size=3).problems) == 1


def test_corpus_folders(tmp_path):
    def said(path, *overrides):
        return str(problems(list(overrides), path).problems[0])

    assert "no such folder" in said(tmp_path / "nowhere")
    (tmp_path / "plain").mkdir()
    assert "holds no manifest.json" in said(tmp_path / "plain")
    (tmp_path / "plain" / "manifest.json").write_text("{")
    assert "manifest.json is broken" in said(tmp_path / "plain")
    (tmp_path / "file").touch()
    assert "is a file" in said(tmp_path / "file")
    assert "no corpus named" in said("")
    full, empty = {"documents": 1, "tokens": 9999}, {"documents": 0, "tokens": 0}
    corpus = write_manifest(tmp_path / "no_proxy", counts={"docs": {"pool": full, "proxy": empty, "validation": full}})
    assert "its split 'proxy' is empty for docs" in said(corpus, "selection=opus")
    assert "--proxy-fraction, or name another corpus with data.proxy_path" in said(corpus, "selection=opus")
    compose([f"data.path={corpus}"])  # a uniform run draws no proxy
    corpus = write_manifest(tmp_path / "no_val", counts={"docs": {"pool": full, "proxy": full, "validation": empty}})
    assert "its split 'validation' is empty for docs" in said(corpus)
    other = write_manifest(tmp_path / "other", tokenizer="two")
    assert "its tokenizer is not that of data.path" in said(corpus, f"data.validation_path={other}")
    assert f"--tokenizer {corpus}/tokenizer.json" in said(corpus, f"data.validation_path={other}")
    ended = write_manifest(tmp_path / "ended", eod="</s>")
    masked = [f"data.validation_path={ended}", "data.document_mask=true"]
    assert "its documents end with '</s>', those of data.path with '<|end|>'" in said(corpus, *masked)


def test_a_held_out_target_must_fill_a_sequence_and_be_of_the_tokenizer(tmp_path):
    """Of the corpus that a proxy is of, also where nothing is chosen by it."""
    corpus = write_manifest(tmp_path / "corpus")
    for name, tokens, tokenizer in (("short", 256, "one"), ("long", 257, "one"), ("other", 257, "two")):
        folder = write_manifest(tmp_path / name, tokenizer=tokenizer)
        manifest = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps({**manifest, "target": {"fingerprint": "abc"}}))
        counts = {part: {"target": {"documents": 1, "tokens": n}} for part, n in (("items", 9), ("nearest", tokens))}
        write_manifest(folder / "target", counts=counts)
    for method in ("uniform", "opus"):
        compose([f"data.path={corpus}", f"data.proxy_path={tmp_path / 'long'}", f"selection={method}"])
        error = str(problems([f"data.proxy_path={tmp_path / 'short'}", f"selection={method}"], corpus))
        assert "its split 'target' fills no sequence of data.seq_len = 256 for items, nearest" in error
        assert "below 256 (its longest), or make it again with a larger 'proxy --held-out', or with 0" in error
        error = str(problems([f"data.proxy_path={tmp_path / 'other'}", f"selection={method}"], corpus))
        assert "its tokenizer is not that of data.path" in error


def test_a_wanted_domain_must_fill_a_sequence_on_its_own(tmp_path):
    full, short = {"documents": 1, "tokens": 9999}, {"documents": 1, "tokens": 200}
    counts = {"big": {"pool": full, "validation": full}, "small": {"pool": full, "validation": short}}
    corpus = write_manifest(tmp_path / "corpus", counts=counts)
    compose([f"data.path={corpus}"])
    error = problems(["data.target_domains=[small]"], corpus)
    assert "its split 'validation' fills no sequence of data.seq_len = 256 for small" in str(error)
    assert "use a data.seq_len below 200 (its longest)" in str(error)


def test_run_dir_below_a_file(corpus, tmp_path):
    (tmp_path / "taken").touch()
    for run_dir in ("taken", "taken/run"):
        error = problems([f"run_dir={tmp_path / run_dir}"], corpus)
        assert f"{tmp_path / 'taken'} is a file, not a folder" in str(error)


def test_broken_files_of_a_user(corpus, tmp_path):
    folder = tmp_path / "mine"
    assert "no such folder" in str(problems([], corpus, config_dir=folder))
    (folder / "experiment").mkdir(parents=True)
    file = folder / "experiment" / "mine.yaml"
    file.write_text("# @package _global_\ntrain:\n  stesp: 5\n  steps: soon\n")
    error = problems(["experiment=mine"], corpus, config_dir=folder)
    assert [problem.key for problem in error.problems] == ["train.stesp", "train.steps"]
    assert f" or {folder})" in str(error.problems[0])
    file.write_text("train: [")
    assert "the files cannot be composed" in str(problems(["experiment=mine"], corpus, config_dir=folder))
    file.write_text("# @package _global_\ndefaults:\n  - override /model: gpt5\n")
    error = problems(["experiment=mine", "lr=1"], corpus, config_dir=folder)
    assert "model/gpt5" in str(error)
    assert "did you mean optim.lr?" in str(error)
