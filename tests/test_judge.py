"""The judge against a small server in this process: strict reading, retries, nothing lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from endpoint import Server, images_of, picture, prompt_of, said
from limner.cli import main
from limner.recipe import ScorerSpec
from limner.records import Choice, Score, to_table
from limner.scorers import backends, judge
from limner.scorers.backends import Answer, HttpBackend, Journal, Question, ask_all
from limner.steps.run import load_scorer
from limner.store import open_step, read_rows


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.close()


def scorer(server: Server, template: str = "pointwise", **options: Any) -> judge.JudgeScorer:
    return judge.JudgeScorer("mine", HttpBackend(server.url, "m", sleep=lambda s: None, **options), template)


POINTS = {
    "A man, well drawn.\nFinal Score: 4.5": 4.5,
    "**Final Score:** 3/5": 3.0,
    "final score: 5 / 5.": 5.0,
    "Well drawn. Final Score: 4\n\nFinal Score: 4.0": 4.0,
    "# Final Score: **4**": 4.0,
    "2": 2.0,
    " 3.5/5 ": 3.5,
    "Final Score: 10": "unparsable answer, its score is not in 1..5: 'Final Score: 10'",
    "Final Score: -1": "unparsable answer, its score is not in 1..5: 'Final Score: -1'",
    "Final Score: 0": "unparsable answer, its score is not in 1..5: 'Final Score: 0'",
    "Final Score: 2\nFinal Score: 3": "unparsable answer, it gives several scores: 'Final Score: 2 Final Score: 3'",
    **{
        text: f"unparsable answer, expected one line `Final Score: x`: {text!r}"
        for text in (
            "Final Score: 4/10",
            "Final Score: 4-5",
            "Final Score: 3 to 4",
            "Final Score: 2,5",
            "Final Score: 3/4",
            "Final Score: 2 or Final Score: 3",
            "It is no Final Score: 3",
            "Final Score: 45%",
        )
    },
    "Final Score: 1 to 2\nFinal Score: 3": "unparsable answer, expected one line `Final Score: x`: 'Final Score: 1 to 2 Final Score: 3'",
    "I would say 4 of 5 people like it.": "unparsable answer, expected one line `Final Score: x`: 'I would say 4 of 5 people like it.'",
    "Final Score: x": "unparsable answer, expected one line `Final Score: x`: 'Final Score: x'",
    "Final Score: four": "unparsable answer, expected one line `Final Score: x`: 'Final Score: four'",
    "": "unparsable answer, expected one line `Final Score: x`: ''",
    "I cannot judge people. " * 9: f"unparsable answer, expected one line `Final Score: x`: {('I cannot judge people. ' * 9)[:80]!r} ...",
}


@pytest.mark.parametrize("text", POINTS)
def test_points_are_read_strictly(text: str) -> None:
    assert judge.read_points(Answer(text=text)) == POINTS[text]


def test_choices_are_read_strictly() -> None:
    read = [judge.read_choice(Answer(text=t)) for t in ("x\nBetter: 1", "better: Image 2.", "**Better:** tie", "Both fail. Better: 2")]
    assert read == [1.0, 0.0, 0.5, 0.0]
    assert "it chooses both:" in str(judge.read_choice(Answer(text="Better: 1\nBetter: 2")))
    for text in ("1", "Image 1 is better. 2 has no hands.", "Better: 1 or 2", "Better: 1.5", "not better: tie", "Better: 1 or better: 2",
                 "Better: 12", "Better: ties"):  # fmt: skip
        assert str(judge.read_choice(Answer(text=text))).startswith("unparsable answer, expected one line"), text


def test_yes_is_a_sum_over_its_spellings() -> None:
    first = {"Yes": 0.5, " yes": 0.125, "YES": 0.0625, "No": 0.25, "yesterday": 0.05}
    assert judge.read_yes(Answer(first=first)) == pytest.approx(0.6875)
    assert judge.read_yes(Answer(first={"no": 0.9})) == 0
    assert judge.read_yes(Answer(text="Maybe", first={"Maybe": 0.9})) == (
        "unparsable answer, neither yes nor no is among its likely first words: 'Maybe'"
    )
    assert "gives no probabilities" in str(judge.read_yes(Answer(text="Yes")))


def test_a_judge_scores_what_it_is_shown(server: Server) -> None:
    """The server gives 1 + a hundredth of the picture's brightness, nothing for one, and refuses another."""

    def reply(body: dict[str, Any]) -> tuple[int, Any]:
        (shown,) = images_of(body)
        value = shown.getpixel((0, 0))[0]  # type: ignore[index]
        return (400, "image too small") if value == 90 else (200, said("no idea" if value == 70 else f"Final Score: {1 + value / 100}"))

    server.reply = reply
    mine = scorer(server)
    found = mine.score_pictures([picture(v) for v in (50, 70, 90, 100, 50)], ["a man"] * 5)
    assert [found[0], found[3], found[4]] == [1.5, 2.0, 1.5]
    assert "no idea" in str(found[1]) and found[2] == "the endpoint refused it (status 400: image too small)"
    assert len(server.seen) == 4, "the same question is asked once"
    assert "\na man\n" in prompt_of(server.seen[0]) and server.seen[0]["temperature"] == 0 and server.seen[0]["model"] == "m"
    images = torch.stack([torch.full((3, 6, 8), v / 255) for v in (50, 70)])
    values = mine(images, ["a man"] * 2)
    assert values[0] == 1.5 and values[1].isnan()
    assert mine.range == (1.0, 5.0) and mine.revision.startswith("judge_pointwise@m:") and mine.higher_is_better


def test_yes_probabilities_come_from_the_first_token(server: Server) -> None:
    server.reply = lambda body: (200, said("Yes", "length", {"Yes": 0.75, "No": 0.125}))
    assert scorer(server, "yes").score_pictures([picture(1)], ["two men"]) == [pytest.approx(0.75)]
    assert server.seen[0]["logprobs"] is True and server.seen[0]["top_logprobs"] == 20 and server.seen[0]["max_tokens"] == 1
    assert prompt_of(server.seen[0]) == 'Does this figure show "two men"? Please answer yes or no.'


def test_pairs_are_asked_in_both_orders(server: Server) -> None:
    """Who prefers the brighter one gets 1 or 0 whatever the order; who prefers the first place gets 1/2; half an answer is none."""
    server.reply = lambda body: (
        200,
        said(f"Better: {1 if images_of(body)[0].getpixel((0, 0)) > images_of(body)[1].getpixel((0, 0)) else 2}"),
    )  # type: ignore[operator]
    bright, dark = picture(200), picture(10)
    assert scorer(server).compare([bright, dark], [dark, bright], ["a", "a"]) == [1, 0]
    server.reply = lambda body: (200, said("Better: 1"))
    assert scorer(server).compare([bright], [dark], ["b"]) == [0.5]
    server.reply = lambda body: (200, said("Better: 1" if images_of(body)[0].getpixel((0, 0)) == (10, 10, 10) else "hm"))
    (found,) = scorer(server).compare([bright], [dark], ["c"])
    assert "unparsable answer" in str(found)


def test_a_cut_answer_has_no_score(server: Server) -> None:
    server.reply = lambda body: (200, said("The man. Final Score: 1", "length"))
    assert scorer(server).score_pictures([picture(1)], ["a"]) == ["the answer was cut off at its longest"]


def test_busy_and_failing_endpoints_are_asked_again(server: Server) -> None:
    """429 (Retry-After 7), 503 and rubbish before the answer: waits of at least 7, then twice the first, then four times it."""
    replies = iter([(429, "busy"), (503, ""), (200, "<html>"), (200, said("Final Score: 2"))])
    server.reply = lambda body: next(replies)
    waits: list[float] = []
    backend = HttpBackend(server.url, "m", sleep=waits.append, backoff=1.0)
    assert judge.JudgeScorer("mine", backend).score_pictures([picture(1)], ["a"]) == [2.0]
    assert len(waits) == 3 and waits[0] == 7 and 2 <= waits[1] <= 2.5 and 4 <= waits[2] <= 5


def test_answers_that_break_off_are_asked_for_again(server: Server) -> None:
    """Fewer bytes than promised, of an answer and of an error, no status line, and nothing at all."""
    broken = [b"HTTP/1.0 200 OK\r\nContent-Length: 99\r\n\r\n{", b"HTTP/1.0 503 Busy\r\nContent-Length: 99\r\n\r\nb", b"rubbish\r\n", b""]
    replies = iter([*((200, b) for b in broken), (200, said("Final Score: 2"))])
    server.reply = lambda body: next(replies)
    assert scorer(server).score_pictures([picture(1)], ["a"]) == [2.0]
    server.reply = lambda body: (200, broken[0])
    with pytest.raises(ValueError, match=r"gave no answer in 3 tries \(IncompleteRead\(1 bytes read, 98 more expected\)\)"):
        scorer(server, tries=3).score_pictures([picture(2)], ["a"])


def test_a_wrong_key_or_model_stops_at_once(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    server.reply = lambda body: (404, "the model m does not exist")
    with pytest.raises(
        ValueError, match=r"refuses questions to m \(status 404: the model m does not exist\); check the address, .*OPENAI_API_KEY"
    ):
        scorer(server, workers=1).score_pictures([picture(1), picture(2)], ["a", "a"])
    assert len(server.seen) == 1 and server.headers[0]["Authorization"] == "Bearer secret"


def test_nothing_is_lost_when_the_endpoint_goes_away(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Away after three of six answers: an error that says what to do; the second run asks only the other three."""
    rows = [{"image": judge.png(picture(i)), "text": f"a man {i}"} for i in range(6)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    spec = ScorerSpec(kind="judge", path=server.url, model="m")
    mine = load_scorer("mine", spec)
    assert isinstance(mine, judge.JudgeScorer) and isinstance(mine.backend, HttpBackend)
    mine.backend._sleep, mine.backend._workers, mine.backend._tries = lambda s: None, 1, 3
    server.reply = lambda body: (200, said("Final Score: 3")) if len(server.seen) <= 3 else (503, "restarting")
    from limner.scorers.files import Source, score_files

    with pytest.raises(
        ValueError, match=r"gave no answer in 3 tries \(status 503: restarting.*\); the answers so far are kept, run the same"
    ):
        score_files(Source(path=tmp_path / "x.parquet"), tmp_path / "out", [mine])
    assert len(server.seen) == 6
    server.reply, server.seen = lambda body: (200, said(f"Final Score: {prompt_of(body).split('a man ')[1][0]}")), []
    words = ["score", "--images", str(tmp_path / "x.parquet"), "--output_dir", str(tmp_path / "out")]
    assert main([*words, "--scorers", f"mine={server.url},kind=judge,model=m"]) == 0
    assert len(server.seen) == 3
    assert [s.score for s in read_rows(tmp_path / "out", Score)] == [3, 3, 3, 3, 4, 5]
    choices = open_step(tmp_path / "choices", "choices", {}, {})
    shown = tuple(r["image"] for r in rows[:2])
    choices.write(
        0, to_table(Choice, [Choice(id="r", prompt_id="p", text="a man 0", kind="choice", said=(1, 0), files=("0", "1"), images=shown)])
    )
    choices.finish({})
    judged = ["scorer", "evaluate", "--choices", str(tmp_path / "choices"), "--output_dir", str(tmp_path / "judged")]
    judged += ["--scorers.mine.kind", "judge", "--scorers.mine.path", server.url, "--scorers.mine.model", "m"]
    for asked in (2, 0):  # the second time from what was kept
        server.seen = []
        assert main(judged) == 0 and len(server.seen) == asked
    assert main(["score", *words[1:4], str(tmp_path / "b"), "--scorers", f"mine={server.url},kind=judge"]) == 2
    assert "scorers.mine.model: not set; which model does http" in capsys.readouterr().err


def test_an_unreachable_endpoint(tmp_path: Path) -> None:
    """Nothing listens there: every try waits longer; the error names the address."""
    quiet = Server()
    quiet.close()
    waits: list[float] = []
    backend = HttpBackend(quiet.url, "m", tries=4, sleep=waits.append)
    with pytest.raises(ValueError, match=rf"{quiet.url} gave no answer in 4 tries \(.*refused.*\)"):
        judge.JudgeScorer("mine", backend).score_pictures([picture(1)], ["a"])
    assert len(waits) == 3 and waits == sorted(waits)


def test_the_journal_survives_a_crash_while_it_writes(tmp_path: Path) -> None:
    path, questions = tmp_path / "a.jsonl", [Question(text=t, images=(b"1",)) for t in "ab"]
    asked: list[str] = []

    class Backend:
        model, revision, files = "m", "", {}  # type: ignore[var-annotated]

        def ask(self, wanted: list[Question], keep: Callable[[int, Answer], None]) -> None:
            for i, q in enumerate(wanted):
                asked.append(q.text)
                keep(i, Answer(text="new"))

    journal, other = Journal(path, Backend()), Backend()
    for q in questions:
        journal.keep(q, Answer(text=q.text))
    path.write_bytes(path.read_bytes()[:-9])
    assert [a.text for a in ask_all(Backend(), questions, Journal(path, Backend()))] == ["a", "new"]
    assert asked == ["b"]
    assert [a.text for a in ask_all(Backend(), questions, Journal(path, Backend()))] == ["a", "new"] and asked == ["b"]
    other.revision = "of other weights"
    assert not Journal(path, other).answers


def test_where_not_one_question_is_answered_the_run_stops(tmp_path: Path) -> None:
    """And asks again the next time. Of three questions each may be at fault; an answer kept from before says that the model answers."""

    class Backend:
        model, revision, files = "m", "", {}  # type: ignore[var-annotated]

        def ask(self, wanted: list[Question], keep: Callable[[int, Answer], None]) -> None:
            for i in range(len(wanted)):
                keep(i, Answer(problem="it takes no images"))

    questions = [Question(text=t, images=(b"1",)) for t in "abcd"]
    with pytest.raises(ValueError, match=r"m answers none of 4 questions \(it takes no images\); mend that"):
        ask_all(Backend(), questions, Journal(tmp_path / "a.jsonl", Backend()))
    assert not (tmp_path / "a.jsonl").exists()
    assert len(ask_all(Backend(), questions[:3], Journal(None, Backend()))) == 3
    journal = Journal(None, Backend())
    journal.keep(questions[0], Answer(text="yes"))
    assert len(ask_all(Backend(), questions, journal)) == 4


WORDS = ["<pad>", "<s>", "</s>", "<unk>", "<image>", "yes", "no", "a", "man", "2"]


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA of a few thousand random weights, its four image tokens before the text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        CLIPImageProcessorPil,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )  # fmt: skip

    folder = tmp_path_factory.mktemp("llava")
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )
    vision = CLIPVisionConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8)
    text = LlamaConfig(vocab_size=len(WORDS), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                       bos_token_id=1, eos_token_id=2, pad_token_id=0)  # fmt: skip
    torch.manual_seed(0)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=4, vision_feature_layer=-1)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}), tokenizer, patch_size=8,
        vision_feature_select_strategy="default", image_token="<image>", num_additional_image_tokens=1,
        chat_template="{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>{% else %} {{ c['text'] }}"
        "{% endif %}{% endfor %}{% endfor %}",
    ).save_pretrained(folder)  # fmt: skip
    return folder


def test_a_local_model_answers(llava: Path) -> None:
    """P(yes) of its first token as one pass of the model by hand gives it; a text as greedy decoding token by token gives it."""
    from transformers import LlavaForConditionalGeneration

    from limner.scorers.tower import preprocess_pictures

    shown, asked = Image.new("RGB", (20, 30), (9, 200, 3)), 'Does this figure show "a man"? Please answer yes or no.'
    mine = load_scorer("mine", ScorerSpec(kind="judge", path=str(llava), template="yes"))
    assert isinstance(mine, judge.JudgeScorer) and list(mine.files) == ["model.safetensors"] and mine.revision.startswith("judge_yes@")
    found = mine.score_pictures([shown, picture(7)], ["a man", "a man"])
    model = LlavaForConditionalGeneration.from_pretrained(llava)
    ids = [
        WORDS.index(w) if w in WORDS else 3
        for w in ("Does", "this", "figure", "show", '"', "a", "man", '"?', "Please", "answer", "yes", "or", "no", ".")
    ]
    ids = [4] * 4 + ids
    pixels = preprocess_pictures([shown], 16, "transformers")
    with torch.no_grad():
        first = model(input_ids=torch.tensor([ids]), pixel_values=pixels).logits[0, -1].softmax(-1)
    assert found[0] == pytest.approx(float(first[5]), rel=1e-4) and found[0] != found[1]
    answers: list[Answer] = []
    mine.backend.ask([Question(text=asked, images=(judge.png(shown),), max_tokens=4)], lambda i, a: answers.append(a))
    wanted = []
    with torch.no_grad():
        for _ in range(4):
            wanted.append(int(model(input_ids=torch.tensor([ids + wanted]), pixel_values=pixels).logits[0, -1].argmax()))
            if wanted[-1] == 2:
                break
    assert answers[0].text == " ".join(WORDS[i] for i in wanted if i > 4)
    assert bool(answers[0].problem) == (wanted[-1] != 2)


def test_backends_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"scorers\.mine\.path: .* is neither an address \(http://\.\.\.\) nor a folder with config\.json"):
        load_scorer("mine", ScorerSpec(kind="judge", path=str(tmp_path)))
    with pytest.raises(ValueError, match=r"scorers\.mine\.template: 'stars'; expected one of pointwise, yes"):
        judge.JudgeScorer("mine", HttpBackend("http://x", "m"), "stars")
    assert backends.data_url(judge.png(picture(1))).startswith("data:image/png;base64,iVBOR")
