"""`limner scorer judge` against a small server in this process: both orders, what is missing, going on, who reads it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from endpoint import Server, images_of, picture, prompt_of, said
from limner.cli import main
from limner.examples.curriculum import load_candidates, pick
from limner.recipe import Source
from limner.records import Choice, Image, Prompt, to_table
from limner.scorers.backends import HttpBackend
from limner.scorers.judge import png
from limner.scorers.pairwise import JudgePairs, judge_pairs, plan
from limner.store import open_step, read_rows


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.close()


SHADES = {"a man": {"m0": 10, "m1": 200, "m2": 90}, "two men": {"t0": 60, "t1": 50}, "a tree": {"alone": 30}, "": {"mute": 1}}


def pool(folder: Path, shades: dict[str, dict[str, int]], model: str = "", spoilt: str = "") -> Path:
    """A step's folder of uniform pictures; prompt ids are the texts behind `p/`."""
    step = open_step(folder, "pool", {}, {})
    rows = [
        Image(id=name, prompt_id=f"p/{text}", text=text, image=b"broken" if name == spoilt else png(picture(value)), model=model)
        for text, group in shades.items()
        for name, value in group.items()
    ]
    step.write(0, to_table(Image, rows))
    step.finish({})
    return folder


def brighter(body: dict[str, Any]) -> tuple[int, Any]:
    a, b = (shown.getpixel((0, 0))[0] for shown in images_of(body))  # type: ignore[index]
    return 200, said(f"Because.\nBetter: {1 if a > b else 2 if b > a else 'tie'}")


def run(server: Server, images: Path, out: Path, *options: str) -> int:
    return main(["scorer", "judge", "--images", str(images), "--output_dir", str(out), "--backend", server.url, "--model", "m", *options])


def lines(out: Path) -> list[dict[str, Any]]:
    return [r for p in sorted(out.glob("pairs-*.parquet")) for r in pq.read_table(p).to_pylist()]


def test_all_pairs_of_a_prompt_become_choices(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The server prefers the brighter one: who won follows from the shades; a picture alone and one without a prompt take no part."""
    server.reply = brighter
    images = pool(tmp_path / "pool", SHADES, "model-a")
    assert run(server, images, tmp_path / "out", "--dry_run") == 0
    assert "4 pairs of 2 prompts, 8 questions\n  1 images left out: no prompt\n  1 images left out: nothing to" in capsys.readouterr().out
    assert not server.seen and run(server, images, tmp_path / "out") == 0
    assert len(server.seen) == 8 and sorted({prompt_of(b).split("caption:\n")[1].split("\n")[0] for b in server.seen}) == [
        "a man",
        "two men",
    ]
    rows = list(read_rows(tmp_path / "out", Choice))
    assert {r.files: r.said for r in rows} == {("m0", "m1"): (0, 1), ("m0", "m2"): (0, 1), ("m1", "m2"): (1, 0), ("t0", "t1"): (1, 0)}
    assert {(r.kind, r.rater, r.generators) for r in rows} == {("choice", "m", ("model-a", "model-a"))}
    assert rows[0].images == (png(picture(10)), png(picture(200))) and len({r.prompt_id for r in rows}) == 2
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert (report["judged"], report["ties"], report["missing"], report["same_in_both_orders"]["value"]) == (4, 0, {}, 1)
    assert report["first_place"]["value"] == 0.5 and "wins" not in report
    assert "4 of 4 pairs of 2 prompts judged, 0 ties" in capsys.readouterr().out


def test_who_reads_it(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`scorer evaluate` with scores by hand, of which three of four agree; `scorer export`; a stage `from: feedback`."""
    server.reply = brighter
    out = tmp_path / "out"
    assert run(server, pool(tmp_path / "pool", SHADES), out) == 0
    scores = [{"file": f, "scorer": "hand", "score": float(v)} for f, v in {"m0": 1, "m1": 3, "m2": 2, "t0": 1, "t1": 2}.items()]
    pq.write_table(pa.Table.from_pylist(scores), tmp_path / "hand.parquet")
    words = ["--choices", str(out), "--output_dir"]
    assert main(["scorer", "evaluate", *words, str(tmp_path / "judged"), "--scores", str(tmp_path / "hand.parquet")]) == 0
    assert json.loads((tmp_path / "judged/agreement.json").read_text())["scorers"]["hand"]["accuracy"]["value"] == 0.75
    assert main(["scorer", "export", *words, str(tmp_path / "export")]) == 0
    assert pq.read_table(tmp_path / "export/part-00000.parquet").column("best_image_uid").to_pylist() == ["m1", "m2", "m1", "t0"]
    prompts = open_step(tmp_path / "prompts", "prompts", {}, {})
    prompts.write(0, to_table(Prompt, [Prompt(id="p/a man", text="a man")]))
    prompts.finish({})
    preferred = out / "preferences"
    found = load_candidates(tmp_path / "prompts", {"feedback": preferred / "images"}, [preferred / "scores"], {})
    assert found.scores == {("feedback", n): s for n, s in {"m0": 0, "m1": 1, "m2": 0.5, "t0": 1, "t1": 0}.items()}
    best = pick(Source(source="feedback"), "p/a man", found, "winner")
    assert not isinstance(best, str) and (best.image_id, best.image, best.score) == ("m1", b"", 1)
    assert found.pictures.fill(best).image == png(picture(200))


def test_a_model_that_goes_by_place_gives_ties(server: Server, tmp_path: Path) -> None:
    server.reply = lambda body: (200, said("Better: 1"))
    assert run(server, pool(tmp_path / "pool", SHADES), tmp_path / "out") == 0
    assert {r.said for r in read_rows(tmp_path / "out", Choice)} == {(0.5, 0.5)}
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert (report["first_place"]["value"], report["same_in_both_orders"]["value"], report["ties"]) == (1, 0, 4)


def test_what_cannot_be_read_is_missing(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No answer in one of two orders, a picture that is broken: no choice, and the reason."""
    server.reply = lambda body: brighter(body) if images_of(body)[0].getpixel((0, 0)) != (60, 60, 60) else (200, said("Both are fine"))
    assert run(server, pool(tmp_path / "pool", SHADES, spoilt="m2"), tmp_path / "out") == 0
    assert [r.files for r in read_rows(tmp_path / "out", Choice)] == [("m0", "m1")]
    found = {(x["first"], x["second"]): (x["said_first"], x["said_second"], x["reason"]) for x in lines(tmp_path / "out")}
    assert found["m0", "m1"] == (0, 0, None)
    assert found["t0", "t1"][:2] == (None, None) and found["t0", "t1"][2].startswith("unparsable answer, expected one line `Better: 1`")
    assert found["m1", "m2"][2] == found["m0", "m2"][2] == "m2: not a readable image (of no known format)"
    assert "1 of 4 pairs" in (said_ := capsys.readouterr().out) and "2 without: m2: not a readable image" in said_
    server.reply = lambda body: (200, said("hm"))
    assert run(server, tmp_path / "pool", tmp_path / "none") == 2
    assert (
        "not one pair has an answer (2: unparsable answer, expected one line `Better: 1`, `2` or `tie`: 'hm'; 2: m2: not a readable"
        in capsys.readouterr().err
    )


def test_two_sets_are_compared_place_by_place(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ours is brighter in two of three; one more image has no counterpart. Ids of both sets are the same."""
    server.reply = brighter
    ours = pool(tmp_path / "ours", {"a": {"0": 9, "1": 9, "2": 9}, "b": {"3": 9}})
    base = pool(tmp_path / "base", {"b": {"3": 8}, "a": {"0": 10, "1": 1}})
    assert run(server, ours, tmp_path / "out", "--against", str(base)) == 0
    rows = {r.files: (r.said[0], r.generators) for r in read_rows(tmp_path / "out", Choice)}
    names = ("ours", "base")
    assert rows == {("images/0", "against/0"): (0, names), ("images/1", "against/1"): (1, names), ("images/3", "against/3"): (1, names)}
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["wins"]["value"] == pytest.approx(2 / 3) and report["left_out"] == {"nothing to compare it with": 1}
    assert "the images win: 0.667 [" in capsys.readouterr().out


def test_prompts_of_two_sets_are_one_where_their_texts_are(server: Server, tmp_path: Path) -> None:
    """Steps number the prompts of their own files: another run's first prompt may be another."""
    server.reply = brighter

    def numbered(folder: Path, texts: list[str], value: int) -> Path:
        step = open_step(folder, "pool", {}, {})
        images = [Image(id=f"{n}/0", prompt_id=f"test-{n}", text=t, image=png(picture(value + n))) for n, t in enumerate(texts)]
        step.write(0, to_table(Image, images))
        step.finish({})
        return folder

    ours, base = numbered(tmp_path / "ours", ["a man", "a cat"], 50), numbered(tmp_path / "base", ["a cat", "a car"], 90)
    assert run(server, ours, tmp_path / "out", "--against", str(base)) == 0
    (row,) = read_rows(tmp_path / "out", Choice)
    assert (row.text, row.files) == ("a cat", ("images/1/0", "against/0/0"))


def test_pairs_by_lot(tmp_path: Path) -> None:
    """Three of the 28 pairs of eight images, the same three again, others with another seed."""
    images = str(pool(tmp_path / "pool", {"a": {f"{i}": i for i in range(8)}}))
    drawn = [plan(JudgePairs(images=images, pairs_per_prompt=3, seed=seed))[1] for seed in (0, 0, 1)]
    assert len(set(drawn[0])) == 3 and drawn[0] == drawn[1] != drawn[2]
    assert len(plan(JudgePairs(images=images))[1]) == 28


def test_it_goes_on_where_the_endpoint_went_away(server: Server, tmp_path: Path) -> None:
    """Away after five of eight answers, in the second shard: only three are asked again, and the shards are those of a run in one go."""
    images = pool(tmp_path / "pool", SHADES)
    backend = HttpBackend(server.url, "m", workers=1, tries=2, sleep=lambda s: None)
    server.reply = lambda body: brighter(body) if len(server.seen) <= 5 else (503, "restarting")
    config = JudgePairs(images=str(images), output_dir=str(tmp_path / "out"), pairs_per_shard=2)
    with pytest.raises(ValueError, match=r"gave no answer in 2 tries \(status 503: restarting.*the answers so far are kept"):
        judge_pairs(config, backend)
    server.reply, server.seen = brighter, []
    report = judge_pairs(config, backend)
    assert len(server.seen) == 3 and report["judged"] == 4
    judge_pairs(JudgePairs(**{**vars(config), "output_dir": str(tmp_path / "one")}), backend)
    for name in ("part-00000.parquet", "part-00001.parquet", "pairs-00001.parquet", "preferences/scores/part-00000.parquet"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


def test_bad_input(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alone = pool(tmp_path / "alone", {"a": {"0": 1}, "b": {"1": 2}, "": {"2": 3}})
    for words, message in (
        (["--images", str(alone)], "no two images of one prompt to compare (1 images: no prompt, 2 images: nothing to compare it with)"),
        (["--images", str(tmp_path / "nowhere")], "nowhere"),
        (["--images", str(alone), "--pairs_per_prompt", "-1"], "pairs_per_prompt, pairs_per_shard: -1, 64"),
        ([], "images: not set; what is to be compared?"),
    ):
        assert main(["scorer", "judge", *words, "--output_dir", str(tmp_path / "o"), "--backend", server.url, "--model", "m"]) == 2
        assert message in capsys.readouterr().err
    assert main(["scorer", "judge", "--images", str(alone), "--output_dir", str(tmp_path / "o")]) == 2
    assert "backend: not set" in capsys.readouterr().err and not server.seen
