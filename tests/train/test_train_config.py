"""Configurations that cannot run are refused with the key, what was expected and what came."""

from pathlib import Path

import pytest
import yaml
from train_tools import SMALLEST

from vgpo_train.config import ConfigError, load_config, save_config
from vgpo_train.main import main
from vgpo_train.rl.algorithms import GRPO, VGPO, Weighting, build_algorithm, register

CONFIGS = Path(__file__).resolve().parents[2] / "vgpo_train" / "configs"


@pytest.mark.parametrize("name", sorted(path.name for path in CONFIGS.glob("*.yaml")))
def test_every_shipped_file_is_valid(name: str) -> None:
    config = load_config(CONFIGS / name, [])
    assert Path(config.deepspeed) == CONFIGS / "zero3.json"
    build_algorithm(config)


def test_the_papers_settings() -> None:
    for name in ("vgpo_7b.yaml", "vgpo_32b.yaml"):
        config = load_config(CONFIGS / name, [])
        loss, weights = config.loss_config(), config.vgpo_config()
        assert (config.rollout.prompts, config.rollout.completions, config.optim.update_prompts) == (512, 8, 128)
        assert (config.optim.lr, config.optim.weight_decay, config.epochs) == (1e-6, 1e-2, 2)
        assert (config.rollout.temperature, config.rollout.top_p) == (1.0, 0.99)
        assert (config.data.max_prompt_length, config.rollout.max_new_tokens) == (4096, 2048)
        assert (config.data.min_pixels, config.data.max_pixels) == (262_144, 4_194_304)
        assert (loss.epsilon_low, loss.epsilon_high, loss.clip_ratio_dual, loss.beta) == (0.2, 0.28, 3.0, 0.0)
        assert tuple(config.rewards.filter_accuracy) == (0.01, 0.99)
        assert config.eval_temperature == 0.6
        assert (weights.beta, weights.gamma, weights.kappa) == (0.3, 0.5, 0.2)


def test_arguments_override_the_file(smallest: Path) -> None:
    arguments = ["optim.lr=1e-4", "algorithm=grpo", "data.test=null", "vgpo.token_clamp=[0.1,2.0]", "loss.beta=0.5"]
    config = load_config(smallest, [*arguments, "rollout.max_new_tokens=77", "optim.betas=[0.8,0.9]"])
    assert (config.optim.lr, config.algorithm, config.data.test) == (1e-4, "grpo", None)
    assert config.vgpo_config().token_clamp == (0.1, 2.0)
    assert config.loss_config().beta == 0.5
    assert config.loss_config().max_completion_length == 77
    assert tuple(config.optim.betas) == (0.8, 0.9)


def test_a_saved_configuration_loads_again(smallest: Path, tmp_path: Path) -> None:
    config = load_config(smallest, ["rewards.filter_accuracy=[0.1,0.9]", "steps=3", "vgpo.kappa=0.4"])
    saved = tmp_path / "elsewhere" / "config.yaml"
    saved.parent.mkdir()
    save_config(config, saved)
    assert load_config(saved, []) == config


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("optm.lr=1", "command line: optm: no such option; did you mean 'optim'"),
        ("optim.learning=1", "command line: optim.learning: no such option; did you mean '"),
        ("rollout.max_tokens=5", "rollout.max_tokens: no such option; did you mean 'max_new_tokens'"),
        ("optim.lr=fast", "(?s)command line: .*'fast'.*lr"),
        ("rollout.prompts=1.5", "(?s)command line: .*1.5.*prompts"),
        ("optim=3", "command line: optim: expected keys and values, got 3"),
        ("model.dtype=float16", "model.dtype: expected one of 'float32', 'bfloat16', got 'float16'"),
        ("model.liger=perhaps", "model.liger: expected one of 'auto', 'on', 'off', got 'perhaps'"),
        ("rollout.gather=sometimes", "rollout.gather: expected one of 'auto', 'always', 'never', got 'sometimes'"),
        ("focus.source=attentive", "focus.source: expected one of 'similarity', 'attention', got 'attentive'"),
        ("focus.layers=lats", "focus.layers: expected 'last', 'all' or a list of layer numbers, got 'lats'"),
        ("focus.layers=3", "focus.layers: expected 'last', 'all' or a list of layer numbers, got 3"),
        ("focus.layers=[]", r"focus.layers: expected 'last', 'all' or a list of layer numbers, got \[\]"),
        ("focus.layers=[1,true]", r"focus.layers: expected .*, got \[1, True\]"),
        ("focus.layers=[1,0.5]", r"focus.layers: expected .*, got \[1, 0.5\]"),
        ("focus.layers={first: 1}", "focus.layers: expected .*, got {'first': 1}"),
        ("resume=maybe", "resume: expected one of 'no', 'auto', got 'maybe'"),
        ("rollout.temperature=0", "rollout.temperature: expected a positive number, got 0"),
        ("optim.micro_batch=-1", "optim.micro_batch: expected a positive number, got -1"),
        ("optim.memory_budget_mb=0", "optim.memory_budget_mb: expected a positive number, got 0"),
        ("rollout.temperature=inf", "rollout.temperature: expected a positive number, got inf"),
        ("rollout.completions=1", "rollout.completions: expected a number of at least 2, got 1"),
        ("rollout.top_k=-2", "rollout.top_k: expected a number of at least 0, got -2"),
        ("optim.warmup_updates=-5", "optim.warmup_updates: expected a number of at least 0, got -5"),
        ("optim.max_grad_norm=-1", "optim.max_grad_norm: expected a number of at least 0, got -1"),
        ("optim.betas=[2,3]", r"optim.betas: expected two numbers in \[0, 1\), got \(2.0, 3.0\)"),
        ("optim.schedule=cosin", "optim.schedule: expected one of .*'cosine', .*, got 'cosin'"),
        ("data.test_limit=0", "data.test_limit: expected a positive number, got 0"),
        ("data.invalid=cut", "data.invalid: expected one of 'refuse', 'drop', got 'cut'"),
        (
            "data.overlong=drop",
            r"data.overlong is now data.invalid \(refuse \| drop\), for all rows that cannot be used",
        ),
        ("data.train=[]", r"data.train: expected a file, a folder, a glob or a list of these, got \[\]"),
        ("data.train=*.jsonl", r"data.train: expected a value that YAML reads, got \*.jsonl; in quotes it is text"),
        ("data.train=3", "data.train: expected a file, a folder, a glob or a list of these, got 3"),
        ("data.test=[a.jsonl,2]", r"data.test: expected a file, .*, got \['a.jsonl', 2\]"),
        ("data.columns=virl", "data.columns: expected 'auto', 'virl39k', 'mmk12' or a mapping .*, got 'virl'"),
        ("data.columns={question: problem}", "data.columns: expected a mapping of id, .*, got the field 'question'"),
        ("data.test_columns={problem: 3}", "data.test_columns: problem: expected the name of a column, got 3"),
        ("eval_temperature=-1", "eval_temperature: expected a number of at least 0, got -1"),
        ("rewards.timeout=0", "rewards.timeout: expected a positive number, got 0.0"),
        ("rewards.weights.exact_match=nan", "rewards.weights.exact_match: expected a finite number, got nan"),
        ("rewards.weights={}", r"rewards.accuracy: expected one of rewards.weights \(\), got 'exact_match'"),
        ("steps=0", "steps: expected a positive number, got 0"),
        ("rollout.top_p=1.5", r"rollout.top_p: expected a number in \(0, 1\], got 1.5"),
        ("rewards.filter_accuracy=[0.9,0.1]", r"rewards.filter_accuracy: expected low < high, got \(0.9, 0.1\)"),
        ("rewards.accuracy=exact", r"rewards.accuracy: expected one of rewards.weights \(exact_match\), got 'exact'"),
        ("optim.update_prompts=100", r"optim.update_prompts: expected a divisor of rollout.prompts \(512\), got 100"),
        ("recipe=papers", "recipe.*papers"),
        ("vgpo.kapa=0.2", "kapa"),
        ("vgpo.kappa=-0.2", "kappa.*-0.2"),
        ("loss.epsilon=0.2", "loss.epsilon: no such option; did you mean 'epsilon_"),
        ("loss.beta=-1", "beta"),
        ("loss.loss_type=ppo", "loss_type.*'ppo'"),
        ("optim.lr", "expected key=value, got 'optim.lr'"),
    ],
)
def test_a_wrong_value_is_named(smallest: Path, argument: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(smallest, [argument])


def test_data_is_a_path_or_a_list_and_columns_a_name_or_a_mapping(smallest: Path) -> None:
    arguments = ["data.train=[a.jsonl,b/*.parquet]", "data.test=b", "data.columns={problem: text}"]
    config = load_config(smallest, [*arguments, "data.test_columns=mmk12"])
    assert (config.data.train, config.data.test) == (["a.jsonl", "b/*.parquet"], "b")
    assert (config.data.columns, config.data.test_columns) == ({"problem": "text"}, "mmk12")
    assert load_config(smallest, ['data.train="*.parquet"']).data.train == "*.parquet"
    path = smallest.parent / "saved.yaml"
    save_config(config, path)
    assert load_config(path, []).data == config.data
    assert load_config(path, ["data.columns=virl39k"]).data.columns == "virl39k"
    assert load_config(path, ["data.columns={answer: gold}"]).data.columns == {"answer": "gold"}


def test_attention_as_source_needs_an_attention_that_can_be_recorded(smallest: Path) -> None:
    config = load_config(smallest, ["focus.source=attention"])
    assert (config.model.attn_implementation, config.focus.layers) == ("vgpo", "last")
    message = "model.attn_implementation: expected 'vgpo' with focus.source=attention, got 'flash_attention_2'"
    with pytest.raises(ConfigError, match=message):
        load_config(smallest, ["focus.source=attention", "model.attn_implementation=flash_attention_2"])
    assert load_config(smallest, ["model.attn_implementation=sdpa"]).focus.source == "similarity"


@pytest.mark.parametrize(("given", "layers"), [("all", "all"), ("[0,-1]", [0, -1])])
def test_layers_survive_saving(smallest: Path, tmp_path: Path, given: str, layers: str | list[int]) -> None:
    config = load_config(smallest, [f"focus.layers={given}"])
    assert config.focus.layers == layers
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml", []).focus.layers == layers


def test_a_mapping_given_whole_replaces_the_files(smallest: Path) -> None:
    config = load_config(smallest, ["rewards.weights={format: 1.0}", "rewards.accuracy=format"])
    assert config.rewards.weights == {"format": 1.0}
    added = load_config(smallest, ["rewards.weights.format=0.5"])
    assert added.rewards.weights == {"exact_match": 1.0, "format": 0.5}


@pytest.mark.parametrize("word", ["on", "off"])
def test_words_that_yaml_takes_for_booleans_stay_words(smallest: Path, word: str) -> None:
    assert load_config(smallest, [f"model.liger={word}", "resume=no"]).model.liger == word
    smallest.write_text(yaml.safe_dump(SMALLEST) + f"resume: no\nfocus: {{log: {word}}}\n")
    config = load_config(smallest, [])
    assert (config.resume, config.focus.log) == ("no", word == "on")


def test_missing_values_are_all_named(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: {path: m}\n")
    with pytest.raises(ConfigError, match=r"run.yaml: no value for data.train, output_dir, rewards.accuracy"):
        load_config(path, [])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modle: {path: m}", r"run.yaml: modle: no such option; did you mean 'model'"),
        ("model: 3", "run.yaml: model: expected keys and values, got 3"),
        ("model:", "run.yaml: model: expected keys and values, got None"),
        ("- a\n- b", "run.yaml: expected keys and values, got ListConfig"),
        ("model: {path: [", "run.yaml: not readable as YAML"),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(path, [])


def test_the_command_says_what_is_wrong_and_fails(tmp_path: Path, smallest: Path, capsys) -> None:
    assert main(["--config", str(tmp_path / "none.yaml")]) == 2
    assert capsys.readouterr().err == f"error: --config: no such file: {tmp_path / 'none.yaml'}\n"
    assert main(["--local_rank=1", "--config", str(smallest), "algorithm=grpo", "optim.typo=1"]) == 2
    assert "error: command line: optim.typo: no such option" in capsys.readouterr().err


def test_only_the_main_process_repeats_the_mistake(smallest: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert main(["--config", str(smallest), "optim.typo=1"]) == 2
    assert capsys.readouterr().err == ""


def test_algorithms_by_name(smallest: Path) -> None:
    assert isinstance(build_algorithm(load_config(smallest, [])), VGPO)
    assert isinstance(build_algorithm(load_config(smallest, ["algorithm=grpo"])), GRPO)
    with pytest.raises(ConfigError, match=r"algorithm: expected one of .*'grpo', .*, got 'vppo'; did you mean 'v"):
        build_algorithm(load_config(smallest, ["algorithm=vppo"]))

    @register("custom")
    class Custom:
        wants = frozenset()

        def __init__(self, config) -> None:
            self.lr = config.optim.lr

        def weigh(self, rollout, step: int) -> Weighting:  # noqa: ARG002
            return Weighting()

    assert build_algorithm(load_config(smallest, ["algorithm=custom", "optim.lr=0.5"])).lr == 0.5
