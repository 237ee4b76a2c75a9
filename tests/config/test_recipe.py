"""What `train=auto` chooses, by what nobody has said; and what it never touches."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fedtune.config.choices import resolved
from fedtune.config.convert import from_dict
from fedtune.config.loader import load
from fedtune.config.recipe import chosen, filled, in_words
from fedtune.config.schema import Config
from fedtune.errors import ConfigError
from tests.support.golden import Golden


@pytest.mark.parametrize("trust", ["local", "distributed", "none"])
def test_one_gradient_a_round_and_one_optimizer_for_the_run(trust: str) -> None:
    config = load([f"privacy={trust}"])
    assert (config.federation.strategy, config.train.local_steps) == ("fedsgd", 1)
    assert config.train.averaging
    # The noise of a secure sum was sized for equal weights; elsewhere larger shards count for more.
    assert config.federation.weighting == ("uniform" if trust == "distributed" else "declared")


def test_under_a_trusted_server_nodes_train() -> None:
    config = load(["privacy=central"])
    assert (config.federation.strategy, config.train.local_steps) == ("fedavg", 8)
    assert config.federation.num_rounds == 6
    assert (config.train.schedule, config.train.averaging) == ("constant", 0.0)


@pytest.mark.parametrize("override", ["train.local_steps=3", "train.proximal_mu=0.1"])
def test_who_asks_for_training_on_nodes_gets_it(override: str) -> None:
    assert load([override]).federation.strategy == "fedavg"


@pytest.mark.parametrize("trust", ["local", "distributed", "central", "none"])
@pytest.mark.parametrize("adapter", ["head", "lora", "ffa_lora", "bitfit"])
@pytest.mark.parametrize("compute", ["quick", "standard", "thorough"])
def test_nothing_is_left_open(trust: str, adapter: str, compute: str) -> None:
    config = load([f"privacy={trust}", f"adapter={adapter}", f"train.compute={compute}"])
    for name, value in chosen(config).items():
        group, _, setting = name.partition(".")
        assert getattr(getattr(config, group), setting) == value is not None, name
    assert filled(config) is config  # once is enough: a node that fills in again changes nothing


@pytest.mark.slow
def test_what_is_given_stays_and_is_named() -> None:
    config = load(["train.learning_rate=0.5", "federation.num_rounds=7"])
    assert (config.train.learning_rate, config.federation.num_rounds) == (0.5, 7)
    assert config.federation.evaluate_every == 2  # at most six times: this is inside the encoder
    assert load(["adapter=head", "federation.num_rounds=7"]).federation.evaluate_every == 1
    assert "given, not by the recipe: train.learning_rate, federation.num_rounds" in in_words(config)
    assert "given" not in in_words(load([]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (["data.declared_size=450"], "head (450 units, fewer than 10,000), 60 rounds"),
        ([], "head (data.declared_size does not say that there are 10,000 units), 60 rounds"),
        (
            ["data.declared_size=50000"],
            "head (data.labels does not say that there are at most 10 classes), 60",
        ),
        (
            ["data.declared_size=50000", "data.labels=[a,b,c,d,e,f,g,h,i,j,k]"],
            "head (11 classes, more than 10), 60 rounds",
        ),
        (["data.declared_size=50000", "data.labels=[a,b]"], "ffa_lora (50,000 units, 2 classes), 85 rounds"),
    ],
)
def test_the_adapter_is_said_with_the_reason(overrides: list[str], why: str) -> None:
    files = ["data=files", "data.name=x", "data.path=x"]
    assert in_words(load([*files, *overrides])).startswith(why)
    given = in_words(load([*files, *overrides, "adapter=bitfit"]))
    assert given.startswith("bitfit, ") and given.endswith("given, not by the recipe: adapter")


@pytest.mark.slow
def test_where_nothing_is_clipped_no_norm_is_named() -> None:
    assert "clipped at 0.9" in in_words(load(["adapter=head"]))
    assert "clipped" not in in_words(load(["adapter=head", "privacy=none"]))
    with pytest.raises(ConfigError, match="head_norm=3 works where gradients are clipped") as raised:
        load(["adapter=lora", "privacy=none", "privacy.head_norm=3"])
    assert raised.value.setting == "privacy.head_norm"


@pytest.mark.slow
def test_inside_the_encoder_where_the_data_is_known_to_be_large() -> None:
    files = ["data=files", "data.name=x", "data.path=x"]
    assert load([]).adapter.name == "ffa_lora"
    for more in ([], ["data.declared_size=50000"], ["data.labels=[a,b]"]):
        assert load([*files, *more]).adapter.name == "head"
    large = ["data.declared_size=50000", "data.labels=[a,b]"]
    assert load([*files, *large]).adapter.name == "ffa_lora"
    assert load([*files, "data.declared_size=500", "data.labels=[a,b]"]).adapter.name == "head"
    assert load([*files, *large, "adapter=head"]).adapter.name == "head"


def test_without_noise_every_linear_layer_has_both_matrices() -> None:
    """Each number that is trained brings noise of its own, where there is noise."""
    plain = load(["privacy=none"])
    assert (plain.adapter.name, plain.adapter.target_modules) == ("lora", ["all-linear"])
    assert in_words(plain).startswith("lora on every linear layer (20,000 units, 2 classes), ")
    for trust in ("local", "distributed", "central"):
        private = load([f"privacy={trust}"])
        assert (private.adapter.name, private.adapter.target_modules) == ("ffa_lora", None)
    assert load(["privacy=none", "adapter=ffa_lora"]).adapter.target_modules == ["all-linear"]
    assert load(["privacy=none", "adapter=bitfit"]).adapter.target_modules is None
    given = load(["privacy=none", "adapter.target_modules=[query]"])
    assert given.adapter.target_modules == ["query"]
    assert "given, not by the recipe: adapter.target_modules" in in_words(given)


@pytest.mark.slow
def test_batches_inside_the_encoder_follow_from_the_declared_size() -> None:
    inside = ["data=files", "data.name=x", "data.path=x", "adapter=ffa_lora"]
    assert load([*inside, "data.declared_size=50000"]).train.sample_rate == 0.02
    assert load([*inside, "data.declared_size=100"]).train.sample_rate == 0.5
    assert load(inside).train.sample_rate == 0.1


@pytest.mark.slow
@pytest.mark.parametrize("rounds", [1, 2, 5, 45, 200])
def test_the_head_comes_first_and_leaves_rounds_for_the_rest(rounds: int) -> None:
    config = load(["adapter=lora", f"federation.num_rounds={rounds}"])
    assert config.train.head_rounds is not None
    assert 0 <= config.train.head_rounds <= rounds // 2
    assert load(["adapter=lora"]).train.head_rounds == 40


@pytest.mark.slow
def test_a_head_that_starts_by_names_is_kept_from_losing_them_in_noise() -> None:
    assert load(["adapter=head"]).train.damped is True
    assert load(["adapter=head", "train.start=zero"]).train.damped is False
    assert load(["adapter=head", "train.damped=false"]).train.damped is False
    assert load(["adapter=lora"]).train.damped is False
    assert load(["adapter=head", "privacy=central"]).train.damped is False


@pytest.mark.slow
def test_a_heads_rate_grows_with_few_rounds_and_falls_with_many() -> None:
    rates = [
        load(["adapter=head", f"federation.num_rounds={rounds}"]).train.learning_rate
        for rounds in (1, 3, 8, 20, 60, 100)
    ]
    assert rates == [0.03, 0.09, 0.24, 0.125389, 0.055007, 0.0375]


def test_the_choice_reads_no_data() -> None:
    """Settings that say where the data is, and which column is which, change nothing."""
    plain = resolved(Config())
    other = resolved(replace(Config(), data=replace(Config().data, name="x", text="y", path="/z")))
    assert chosen(plain) == chosen(other)


@pytest.mark.parametrize("trust", ["local", "none", "central", "distributed"])
def test_the_page_of_fixed_numbers_is_the_other_way_to_train(trust: str) -> None:
    config = load(["train=default", f"privacy={trust}"])
    assert config.federation.strategy == ("fedsgd" if trust == "distributed" else "fedavg")
    assert (config.federation.num_rounds, config.train.local_steps, config.train.averaging) == (12, 4, 0.0)


@pytest.mark.parametrize(
    "overrides",
    [
        ["federation.strategy=fedsgd", "train.local_steps=2"],
        ["federation.strategy=fedsgd", "train.proximal_mu=0.1"],
        ["federation.server_learning_rate=0.5"],
        ["privacy=distributed", "federation.strategy=fedadam"],
        ["privacy=central", "federation.strategy=fedsgd"],
        ["federation.strategy=fedavg", "train.schedule=cosine"],
        ["federation.strategy=fedavg", "train.averaging=0.5"],
        ["federation.strategy=fedavg", "train.damped=true"],
        ["train.personalize=head", "privacy=distributed"],
        ["train.personalize=adapter", "privacy=central"],
        ["train.personalize=head", "train.local_steps=4"],
        ["adapter=head", "federation.strategy=fedavg", "train.centre=true"],
        ["adapter=lora", "train.centre=true"],
        ["adapter=head", "model.normalize=false", "train.centre=true"],
        ["adapter=head", "federation.num_rounds=1", "train.centre=true"],
        ["adapter=head", "privacy=central", "train.centre=true"],
        ["adapter=head", "privacy.head_share=0.3"],
        ["adapter=lora", "privacy=none", "privacy.head_share=0.3"],
        ["adapter=lora", "privacy.head_norm=0", "privacy.head_share=0.3"],
        ["adapter=head", "train.head_learning_rate=0.3"],
        ["adapter=lora", "train.head_rounds=0", "train.head_learning_rate=0.3"],
        ["adapter=lora", "federation.strategy=fedavg", "train.head_learning_rate=0.3"],
        ["adapter=lora", "privacy=central", "train.head_rounds=2", "train.head_learning_rate=0.3"],
    ],
    ids=" ".join,
)
def test_settings_of_the_other_way_are_refused(overrides: list[str], golden: Golden) -> None:
    with pytest.raises(ConfigError) as raised:
        load(overrides)
    golden(raised)


@pytest.mark.parametrize(
    "overrides",
    [
        ["train.personalize=head", "privacy=local"],
        ["train.personalize=head", "privacy=none"],
        [
            "train.personalize=head",
            "federation.strategy=fedsgd",
            "train.local_steps=1",
            "train.proximal_mu=0",
        ],
        ["train.personalize=none", "privacy=distributed"],
        ["adapter=lora", "privacy.head_norm=3", "privacy.head_share=0.3"],
        ["adapter=lora", "privacy.head_share=0.3", "train.head_learning_rate=0.3"],
        ["adapter=head", "train.learning_rate=0.3"],
    ],
    ids=" ".join,
)
def test_the_ways_out_work_as_typed(overrides: list[str]) -> None:
    load(overrides)


def test_a_configuration_of_json_is_filled_in() -> None:
    assert from_dict({}) == resolved(Config())


@pytest.mark.slow
@pytest.mark.parametrize("trust", ["local", "distributed", "none"])
def test_a_head_has_its_texts_centred_where_there_are_rounds_for_it(trust: str) -> None:
    def centre(*overrides: str) -> bool | None:
        return load([f"privacy={trust}", *overrides]).train.centre

    assert centre("adapter=head") is True
    assert centre("adapter=head", "federation.num_rounds=10") is True
    assert centre("adapter=head", "federation.num_rounds=9") is False
    assert centre("adapter=head", "federation.num_rounds=2", "train.centre=true") is True
    assert centre("adapter=head", "train.centre=false") is False
    assert centre("adapter=head", "model.normalize=false") is False
    assert centre("adapter=lora") is False
    assert "the first for the texts' centre" in in_words(load([f"privacy={trust}", "adapter=head"]))
