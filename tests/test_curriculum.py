"""Picks, filters and counts of a curriculum's stages, on scores written out by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from limner.examples.curriculum import Candidates, build_stage, make_examples, pick, selectable
from limner.pool.steps import latents_table
from limner.recipe import Source, Stage
from limner.records import Example, Image, Prompt, Score, to_table
from limner.store import input_hash, is_complete, open_step, read_manifest, read_rows, shards

BEST, WORST = Source(source="pool", pick="best", by="s"), Source(source="pool", pick="worst", by="s")
RECONSTRUCTION = Source(source="reconstruction", t=[400, 700], by="s")


def pool(prompt: str, *scores: float | None) -> tuple[list[Image], dict[tuple[str, str], float]]:
    """Images prompt/0, prompt/1 ... and their scores by "s"; None = the scorer gave none."""
    images = [Image(id=f"{prompt}/{k}", prompt_id=prompt, text=prompt, image=f"{prompt}{k}".encode(), k=k) for k in range(len(scores))]
    return images, {("s", i.id): v for i, v in zip(images, scores) if v is not None}


def renoised(prompt: str, **scores: float) -> tuple[list[Image], dict[tuple[str, str], float]]:
    """Reconstructions prompt/0@t..., e.g. t400=0.5."""
    images = [Image(id=f"{prompt}/0@{t}", prompt_id=prompt, text=prompt, image=t.encode(), timestep=int(t[1:])) for t in scores]
    return images, {("s", i.id): v for i, v in zip(images, scores.values())}


def candidates(
    pools: dict[str, list[float | None]], reconstructions: dict[str, dict[str, float]] | None = None, **more: object
) -> Candidates:
    images: dict[str, dict[str, list[Image]]] = {"pool": {}, "reconstruction": {}}
    scores: dict[tuple[str, str], float] = {}
    for p, values in pools.items():
        images["pool"][p], new = pool(p, *values)
        scores |= new
    for p, named in (reconstructions or {}).items():
        images["reconstruction"][p], new = renoised(p, **named)
        scores |= new
    prompts = {p: Prompt(id=p, text=f"text of {p}", image=b"real" if p != "bare" else None) for p in pools}
    return Candidates(prompts, images, scores, **more)  # type: ignore[arg-type]


def chosen(found: Example | str) -> str:
    assert isinstance(found, Example), found
    return found.image_id


def test_best_and_worst_and_ties() -> None:
    """Of equal scores the earlier image, for both picks; an image without a score is passed over."""
    c = candidates({"a": [0.2, 0.9, 0.9, 0.1, 0.1, None]})
    assert chosen(pick(BEST, "a", c, "winner")) == "a/1"
    assert chosen(pick(WORST, "a", c, "loser")) == "a/3"


def test_what_an_example_says() -> None:
    c = candidates({"a": [0.2, 0.9]})
    found = pick(BEST, "a", c, "winner")
    assert found == Example(
        group="a",
        role="winner",
        image_id="a/1",
        text="text of a",
        image=b"a1",
        score=0.9,
        source="pool",
    )


def test_reconstructions_are_chosen_among_the_named_timesteps() -> None:
    c = candidates({"a": [0.0]}, {"a": {"t100": 0.9, "t400": 0.2, "t700": 0.3}})
    assert chosen(pick(RECONSTRUCTION, "a", c, "winner")) == "a/0@t700"
    assert chosen(pick(Source(source="reconstruction", t=[100]), "a", c, "winner")) == "a/0@t100"
    assert pick(Source(source="reconstruction", t=[200]), "a", c, "winner") == "no image from reconstruction"


def test_reasons_for_having_none() -> None:
    c = candidates({"a": [None, None], "bare": []})
    assert pick(BEST, "a", c, "winner") == "no score by s"
    assert pick(BEST, "bare", c, "winner") == "no image from pool"
    assert pick(Source(source="real"), "bare", c, "winner") == "no real image"
    assert chosen(pick(Source(source="real"), "a", c, "winner")) == "a/real"


def test_an_earlier_stages_role_in_a_new_role() -> None:
    """HG-DPO eq. 9: the hard stage's loser is the normal stage's winner, with its latents."""
    before = Example(group="a", role="winner", image_id="a/7", text="old", image=b"x", latents=b"\0\0\0\0", shape=(1, 1, 1), score=3.0)
    c = candidates({"a": [0.1], "b": [0.1]}, stages={"normal": {("a", "winner"): before}})
    found = pick(Source(source="normal", role="winner"), "a", c, "loser")
    assert isinstance(found, Example)
    assert (found.role, found.image_id, found.latents, found.source, found.text) == ("loser", "a/7", before.latents, "normal", "text of a")
    assert pick(Source(source="normal", role="winner"), "b", c, "loser") == "no example of stage normal"
    assert pick(Source(source="normal", role="loser"), "a", c, "loser") == "no example of stage normal"


def test_the_target_of_an_earlier_stage_counts_as_its_winner() -> None:
    """A supervised stage compares nothing: its images are targets."""
    target = Example(group="a", role="target", image_id="a/real", text="old", image=b"x")
    c = candidates({"a": [0.1]}, stages={"base": {("a", "target"): target}})
    assert chosen(pick(Source(source="base", role="winner"), "a", c, "winner")) == "a/real"
    assert pick(Source(source="base", role="loser"), "a", c, "loser") == "no example of stage base"


def test_counts_of_an_easy_stage() -> None:
    """a is kept; in b all score the same; c has one image, which cannot be both; d has no score."""
    c = candidates({"a": [0.2, 0.9], "b": [0.5, 0.5], "c": [0.5], "d": [None, None]})
    examples, counts = build_stage(Stage(winner=BEST, loser=WORST), c, list("abcd"))
    assert [(e.group, e.role, e.image_id) for e in examples] == [("a", "winner", "a/1"), ("a", "loser", "a/0")]
    assert counts == {"kept": 1, "winner and loser are the same image": 2, "winner: no score by s": 1}


def test_two_images_of_one_score_teach_nothing() -> None:
    """Best of three is the first, worst the last one; were the worst another image of the best's score, the pair is dropped."""
    c = candidates({"a": [0.5, 0.5]}, {"a": {"t400": 0.5}})
    c.images["pool"]["a"].append(Image(id="a/9", prompt_id="a", text="", image=b""))
    stage = Stage(winner=BEST, loser=Source(source="pool", pick="worst", by="other"))
    c.scores |= {("other", "a/0"): 0.9, ("other", "a/1"): 0.5}
    assert build_stage(stage, c, ["a"])[1] == {"winner and loser score the same": 1}


@pytest.mark.parametrize(("loser", "kept"), [(0.5, 1), (0.6, 1), (0.61, 0)])
def test_keep_winner_not_worse(loser: float, kept: int) -> None:
    """Eq. 8: the winner's 0.6 must not lie below the pool's best; an equal score is kept."""
    c = candidates({"a": [0.1, loser]}, {"a": {"t400": 0.6, "t700": 0.3}})
    stage = Stage(winner=RECONSTRUCTION, loser=BEST, keep="winner_not_worse")
    _, counts = build_stage(stage, c, ["a"])
    assert counts == ({"kept": 1} if kept else {"winner scores below loser": 1})
    assert build_stage(Stage(winner=RECONSTRUCTION, loser=BEST), c, ["a"])[1] == {"kept": 1}


def test_keep_needs_both_scores() -> None:
    c = candidates({"a": [0.1]}, {"a": {"t400": 0.6}})
    stage = Stage(winner=Source(source="real"), loser=BEST, keep="winner_not_worse")
    assert build_stage(stage, c, ["a"])[1] == {"no score by s": 1}


def test_a_stage_without_loser_gives_targets() -> None:
    examples, counts = build_stage(Stage(winner=Source(source="real")), candidates({"a": [0.1], "bare": []}), ["a", "bare"])
    assert [(e.role, e.image, e.source) for e in examples] == [("target", b"real", "real")]
    assert counts == {"kept": 1, "winner: no real image": 1}


def test_selectable() -> None:
    """Only picks from the pool need latents kept, each once."""
    stages = {"easy": Stage(winner=BEST, loser=WORST), "normal": Stage(winner=RECONSTRUCTION, loser=BEST)}
    assert selectable(stages) == [("best", "s"), ("worst", "s")]


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """Prompts a, b, c; two pool images each; scores of c are all missing."""
    images = [i for p in "abc" for i in pool(p, 0.0, 0.0)[0]]
    scores = [Score(image_id=i.id, prompt_id=i.prompt_id, scorer="s", score=None if i.prompt_id == "c" else float(i.k)) for i in images]
    rows = {"prompts": [Prompt(id=p, text=p) for p in "abc"], "pool": images, "scores": scores}
    for name, found in rows.items():
        step = open_step(tmp_path / name, name, {}, {})
        step.write(0, to_table(type(found[0]), found))
        step.finish({})
    return {name: tmp_path / name for name in rows}


def examples_of(folders: dict[str, Path], stage: Stage, out: Path) -> dict[str, int]:
    return dict(
        make_examples(
            "easy", stage, out, prompts=folders["prompts"], sources={"pool": folders["pool"]}, scores=[folders["scores"]], stages={}
        )
    )


def test_the_step_writes_pairs_and_counts(folders: dict[str, Path], tmp_path: Path) -> None:
    out, stage = tmp_path / "out", Stage(winner=BEST, loser=WORST)
    wanted = {"kept": 2, "winner: no score by s": 1}
    assert examples_of(folders, stage, out) == wanted
    assert read_manifest(out)["counts"] == wanted
    assert [e.image_id for e in read_rows(out, Example)] == ["a/1", "a/0", "b/1", "b/0"]
    before = {p: p.read_bytes() for p in out.iterdir()}
    assert examples_of(folders, stage, out) == wanted, "again: the same counts, nothing written"
    (out / "manifest.json").write_text((out / "manifest.json").read_text().replace('"complete": true', '"complete": false'))
    assert examples_of(folders, stage, out) == wanted, "after a kill between shard and manifest"
    assert {p: p.read_bytes() for p in out.iterdir()} == before


def test_only_what_was_chosen_is_read_with_its_latents(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each group in a shard of its own, one of them made again. Then a stage that takes the first one's winners, and real images."""
    latents = latents_table([(f"{p}/1", torch.full((2, 1, 1), float(n))) for n, p in enumerate("ab")])
    step = open_step(folders["pool"], "pool", {}, {})
    step.write(0, latents, "latents")
    step.finish({})
    monkeypatch.setattr("limner.examples.curriculum.SHARD", 1)
    out = tmp_path / "out"
    examples_of(folders, Stage(winner=BEST, loser=WORST), out)
    found = list(read_rows(out, Example))
    assert [p.name for p in shards(out)] == ["part-00000.parquet", "part-00001.parquet"]
    assert [(e.image_id, e.image) for e in found] == [("a/1", b"a1"), ("a/0", b"a0"), ("b/1", b"b1"), ("b/0", b"b0")]
    numbers = [e.latents and np.frombuffer(e.latents, np.float32).tolist() for e in found]
    assert numbers == [[0, 0], None, [1, 1], None] and [e.shape for e in found] == [(2, 1, 1), (), (2, 1, 1), ()]
    before = {p: p.read_bytes() for p in out.iterdir()}
    shards(out)[1].unlink()
    (out / "manifest.json").write_text((out / "manifest.json").read_text().replace('"complete": true', '"complete": false'))
    examples_of(folders, Stage(winner=BEST, loser=WORST), out)
    assert {p: p.read_bytes() for p in out.iterdir()} == before

    step = open_step(tmp_path / "photos", "prompts", {}, {})
    step.write(0, to_table(Prompt, [Prompt(id=p, text=p, image=f"photo {p}".encode() if p != "b" else None) for p in "abc"]))
    step.finish({})
    hard = Stage(winner=Source(source="real"), loser=Source(source="easy", role="winner"))
    counts = make_examples("hard", hard, tmp_path / "hard", prompts=tmp_path / "photos", sources={}, scores=[], stages={"easy": out})
    assert counts == {"kept": 1, "winner: no real image": 1, "loser: no example of stage easy": 1}
    winner, loser = read_rows(tmp_path / "hard", Example)
    assert (winner.image, winner.latents, loser.image, loser.latents) == (b"photo a", None, b"a1", found[0].latents)


def test_what_people_saw_is_not_taken_for_a_pools_picture_of_the_same_id(folders: dict[str, Path], tmp_path: Path) -> None:
    """They saw another run's a/0, and liked it least; this run's pool has a picture of that id, and latents of it."""
    seen = [Image(id="a/0", prompt_id="a", text="a", image=b"theirs")]
    said = [Score(image_id="a/0", prompt_id="a", scorer="feedback", score=0.0)]
    for name, found in (("seen", to_table(Image, seen)), ("said", to_table(Score, said))):
        step = open_step(tmp_path / name, name, {}, {})
        step.write(0, found)
        step.finish({})
    step = open_step(folders["pool"], "pool", {}, {})
    step.write(0, latents_table([(f"a/{k}", torch.full((2, 1, 1), float(k))) for k in range(2)]), "latents")
    step.finish({})
    stage = Stage(winner=BEST, loser=Source(source="feedback", pick="worst"))
    sources, scores = {"pool": folders["pool"], "feedback": tmp_path / "seen"}, [folders["scores"], tmp_path / "said"]
    make_examples("easy", stage, tmp_path / "out", prompts=folders["prompts"], sources=sources, scores=scores, stages={})
    winner, loser = read_rows(tmp_path / "out", Example)
    assert (winner.image, loser.image, loser.latents) == (b"a1", b"theirs", None) and winner.latents is not None


def test_images_of_other_prompts_say_so(folders: dict[str, Path], tmp_path: Path) -> None:
    step = open_step(tmp_path / "others", "prompts", {}, {})
    step.write(0, to_table(Prompt, [Prompt(id="x", text="x")]))
    step.finish({})
    words = r"stage easy: no image of pool belongs to a training prompt; those are x \.\.\., the images' a \.\.\."
    with pytest.raises(ValueError, match=words):
        examples_of({**folders, "prompts": tmp_path / "others"}, Stage(winner=BEST, loser=WORST), tmp_path / "out")


def test_another_rule_in_the_same_folder_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    examples_of(folders, Stage(winner=BEST, loser=WORST), tmp_path / "out")
    with pytest.raises(ValueError, match=r"config\.loser\.pick: was 'worst', now 'best'"):
        examples_of(folders, Stage(winner=WORST, loser=BEST), tmp_path / "out")


def test_nothing_kept_lists_the_reasons_each_time(folders: dict[str, Path], tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(ValueError, match=r"stage easy: no example is left; dropped: winner: no image from reconstruction \(3\)"):
            examples_of(folders, Stage(winner=RECONSTRUCTION, loser=WORST), tmp_path / "out")
    assert not is_complete(tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.parquet"))
    with pytest.raises(ValueError, match="is not complete"):
        input_hash(tmp_path / "out")


@pytest.mark.parametrize(
    ("winner", "loser", "why"),
    [
        ((0.9, 5.0), (0.2, 4.0), "kept"),
        ((0.9, 5.0), (0.2, 5.0), "kept"),
        ((0.9, 4.0), (0.2, 5.0), "winner does not win on all"),
        ((0.9, None), (0.2, 5.0), "no score by other"),
        ((0.9, 4.0), (0.2, None), "no score by other"),
    ],
)
def test_winners_that_win_on_all(winner: tuple[float, float | None], loser: tuple[float, float | None], why: str) -> None:
    c = candidates({"a": [winner[0], loser[0]]})
    c.scores.update({("other", f"a/{k}"): v for k, v in enumerate((winner[1], loser[1])) if v is not None})
    _, counts = build_stage(Stage(winner=BEST, loser=WORST, wins_on=["s", "other"]), c, ["a"])
    assert dict(counts) == {why: 1}
