"""Which chains of steps are legal, and the exact words of the refusal where one is not."""

from __future__ import annotations

import pytest

from tfopt import recipe
from tfopt.errors import Problem, RecipeError
from tfopt.technique import Property, techniques


def load_text(tmp_path, text):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    return recipe.load(str(path))


@pytest.mark.parametrize(
    "steps",
    [
        [],
        ["prune"],
        ["qat"],
        ["prune", "qat"],
        ["factorize", "prune", "qat"],
        ["distill", "prune", "qat"],
        ["distill", "factorize", "qat"],
        ["cluster"],
        ["prune", "cluster"],
        ["cluster", "qat"],
        ["prune", "cluster", "qat"],
        ["distill", "factorize", "prune", "cluster", "qat"],
    ],
)
def test_legal_chain(tmp_path, steps):
    schemes = "[int8]" if "qat" in steps else "[float32, int8]"
    made = load_text(tmp_path, f"name: chain\nsteps: {steps}\nschemes: {schemes}\n")
    assert [step.name for step in made.steps] == steps


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (["prune", "factorize"], "step 2 (factorize) would lose what prune gained: sparse"),
        (["prune", "distill"], "step 2 (distill) would lose what prune gained: sparse"),
        (["qat", "prune"], "step 2 (prune) would lose what qat gained: fake quantization"),
        (["distill", "qat", "factorize"], "step 3 (factorize) would lose what qat gained: fake quantization"),
        (["factorize", "distill"], "step 2 (distill) would lose what factorize gained: low rank"),
        (["cluster", "prune"], "step 2 (prune) would lose what cluster gained: clustered"),
        (["cluster", "factorize"], "step 2 (factorize) would lose what cluster gained: clustered"),
        (["cluster", "distill"], "step 2 (distill) would lose what cluster gained: clustered"),
        (["qat", "cluster"], "step 2 (cluster) would lose what qat gained: fake quantization"),
        (["prune", "cluster", "prune"], "step 3 (prune) would lose what prune gained: sparse"),
        (["cluster", "cluster"], "step 2 (cluster) would lose what cluster gained: clustered"),
        (["qat", "qat"], "step 2 (qat) would lose what qat gained: fake quantization"),
    ],
)
def test_illegal_chain_fails_by_name(tmp_path, steps, message):
    with pytest.raises(RecipeError) as caught:
        load_text(tmp_path, f"name: chain\nsteps: {steps}\nschemes: [int8]\n")
    assert message in str(caught.value)
    assert ("Leave one qat out" in str(caught.value)) == (steps == ["qat", "qat"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: []", "has no name"),
        ("name: 5\n", "Put it in quotes"),
        ("name: a\nsteps: [{prune: {exclude: [3]}}]\n", "exclude is no list of layers"),
        ("name: a\nsteps: [{qat: {exclude: 3}}]\n", "exclude is no list of layers"),
        ("name: a\nsteps: [{cluster: {layers: {3: 8}}}]\n", "not a table"),
        ("name: ../x\n", "not usable as a folder"),
        ("name: a\nstep: []\n", "Did you mean steps"),
        ("name: a\nsteps:\nschemes: [int8]\n", "steps: []' for the model as it is"),
        ("name: a\nsteps: {prune: {sparsity: 0.5}}\n", "are not a list"),
        ("name: a\nsteps: [prun]\n", "Did you mean prune"),
        ("name: a\nsteps: [{prune: {sparsty: 0.5}}]\n", "Did you mean sparsity"),
        ("name: a\nsteps: [{prune: {sparsity: 1.5}}]\n", "step 1 (prune)"),
        ("name: a\nsteps: [{prune: {train: {epoch: 1}}}]\n", "Did you mean epochs"),
        ("name: a\nsteps: [{prune: 3}]\n", "is not a technique"),
        ("name: a\nsteps: [{cluster: {clusters: 1}}]\n", "clusters is out of range"),
        ("name: a\nsteps: [{cluster: {clusters: 16.5}}]\n", "clusters is out of range"),
        ("name: a\nsteps: [{cluster: {clusters: 257}}]\n", "int8 has no more values"),
        ("name: a\nsteps: [prune, {cluster: {clusters: 2}}]\n", "3 and above after pruning"),
        ("name: a\nsteps: [{prune: {m_by_n: 2:4}}]\n", "YAML reads 2:4 as 124: write [2, 4]"),
        ("name: a\nsteps: [{prune: {begin: 10}}]\n", "a share of the training's steps"),
        ("name: a\nsteps: [{cluster: {layers: {stem: 1}}}]\n", "The clusters of stem is out of range"),
        ("name: a\nsteps: [{cluster: {layers: 3}}]\n", "not a table"),
        ("name: a\nsteps: [{cluster: {initialization: linera}}]\n", "Did you mean linear"),
        ("name: a\nschemes: [int9]\n", "Did you mean int8"),
        ("name: a\nschemes: int8\n", "are not a list"),
        ("name: a\nschemes: []\n", "has no schemes"),
        ("name: a\nsteps: [qat]\nschemes: [float32]\n", "trains for int8 and exports something else"),
        ("name: [", "is not YAML"),
        (
            "name: a\nsteps:\n  - prune:\n      sparsity: 0.5\n      sparsity: 0.8\n",
            "'sparsity' in line 4 and again in line 5",
        ),
        ("name: a\nsteps: []\nname: b\n", "'name' in line 1 and again in line 3"),
    ],
)
def test_bad_recipe_is_one_clear_error(tmp_path, text, message):
    with pytest.raises(Problem) as caught:
        load_text(tmp_path, text)
    assert message in str(caught.value)
    assert caught.value.exit_code == 2


def test_shipped_recipes_load_and_describe_themselves():
    names = recipe.named_recipes()
    assert set(names) == {
        "baseline", "prune", "prune_2_4", "qat", "lowrank", "channels", "distill", "distill_prune_qat", "cluster",
        "prune_cluster", "prune_qat", "cluster_qat", "prune_cluster_qat",
    }  # fmt: skip
    assert recipe.load("prune_2_4").steps[0].m_by_n == (2, 4)
    assert all(names.values())
    hybrid = recipe.load("distill_prune_qat")
    assert [step.name for step in hybrid.steps] == ["distill", "prune", "qat"]
    assert hybrid.variants() == ("distill_prune_qat-int8",)


def test_training_settings_replace_the_recipes_own():
    changed = recipe.load("distill_prune_qat").with_training({"prune": {"steps": 7}, "*": {"batch_size": 16}})
    assert [step.train.batch_size for step in changed.steps] == [16, 16, 16]
    assert changed.steps[1].train.steps == 7 and changed.steps[1].train.epochs is None
    assert changed.steps[0].train.epochs == recipe.load("distill").steps[0].train.epochs


def test_two_recipes_of_one_name_are_refused():
    with pytest.raises(RecipeError, match="same name"):
        recipe.load_all(["prune", "prune"])


def test_every_technique_adds_something_and_validates_nothing_away():
    for name, cls in techniques().items():
        assert cls.name == name
        assert cls.adds <= set(Property)
        assert cls.adds, f"{name} adds nothing"


def test_a_recipe_names_keras_callbacks(tmp_path):
    made = load_text(
        tmp_path,
        "name: a\nsteps: [{factorize: {train: {callbacks: [TerminateOnNaN, {CSVLogger: {filename: x.csv}}]}}}]\n",
    )
    assert made.steps[0].train.callbacks == ({"TerminateOnNaN": {}}, {"CSVLogger": {"filename": "x.csv"}})
    with pytest.raises(Problem, match="There is no callback for recipes of that name"):
        load_text(tmp_path, "name: a\nsteps: [{prune: {train: {callbacks: [{RemoteMonitor: {}}]}}}]\n")
