"""The tiny world as six benchmarks: real layouts, balanced, decidable, right by the scene's digits, deterministic."""

import hashlib
import json
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_tiny_scenes import solve

from llava.eval.tasks import TASKS, Answer
from playground.tiny import export_eval
from playground.tiny.build import STAGE_SEED
from playground.tiny.eval_questions import claim_pair, quiz
from playground.tiny.export_eval import export
from playground.tiny.questions import ask
from playground.tiny.scenes import make_scene

IMAGES, SEED = 24, 5
SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
MME_NAMES = {
    *("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR"),
    *("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "eval"
    export(folder, IMAGES, SEED)
    return folder


@pytest.fixture(scope="module")
def scenes():
    return [make_scene("heldout", SEED * 10 + STAGE_SEED["heldout"], index) for index in range(IMAGES)]


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def load(path):
    return json.loads(path.read_text(encoding="utf-8"))


def answer_of(question, digits):
    """Answer any exported question without options by looking at the digits."""
    if found := re.fullmatch(r"Are there (\d) digits\?", question):
        return "Yes" if int(found[1]) == len(digits) else "No"
    if found := re.fullmatch(r"Is the (\d) (left|right|top|bottom)most\?", question):
        assert int(found[1]) in {d.value for d in digits}
        return "Yes" if solve(f"Which digit is {found[2]}most?", digits) == found[1] else "No"
    return solve(question, digits)


def text_answer(question):
    """Answer a question that needs no picture."""
    numbers = [int(v) for v in re.findall(r"\d", question)]
    if question.startswith("Which is larger"):
        return str(max(numbers))
    return " ".join(map(str, sorted(numbers))) if question.startswith("Sort") else str(numbers[0] + 1)


def fitting(question, options, digits):
    """Indices of the options that are right."""
    assert len(set(options)) == len(options)
    if question == "Which digit is in the image?":
        present = {str(d.value) for d in digits}
        return [i for i, option in enumerate(options) if option in present]
    answer = answer_of(question, digits) if digits else text_answer(question)
    return [i for i, option in enumerate(options) if option == answer]


def by_name(scenes, name):
    return {name(index): scene.digits for index, scene in enumerate(scenes)}


def test_pictures_lie_where_the_benchmarks_keep_them(root, scenes):
    places = {
        "pope/val2014/COCO_val2014_*.jpg": (1, "JPEG"),
        "gqa/data/images/n*.jpg": (1, "JPEG"),
        "textvqa/train_images/*.jpg": (1, "JPEG"),
        "MME/MME_Benchmark_release_version/*/*.jpg": (3, "JPEG"),
        "scienceqa/images/test/*/image.png": (1, "PNG"),
        "seed_bench/SEED-Bench-image/*": (1, "JPEG"),
    }
    for pattern, (copies, kind) in places.items():
        found = list(root.glob(pattern))
        assert len(found) == copies * IMAGES, pattern
        with Image.open(found[0]) as picture:
            assert (picture.format, picture.size, picture.mode) == (kind, (336, 336), "RGB")
    assert all(not path.suffix for path in (root / "seed_bench" / "SEED-Bench-image").iterdir())
    for index in (0, 7, IMAGES - 1):
        for name in export_eval.image_files(index):
            with Image.open(root / name) as picture:
                off = np.abs(np.asarray(picture, float) - scenes[index].pixels).mean()
            assert off == 0 if name.endswith(".png") else 0 < off < 4, name


def test_pope_asks_three_kinds_of_absent_digits_in_equal_numbers(root, scenes):
    digits = by_name(scenes, export_eval.pope_image)
    present = {name: {d.value for d in found} for name, found in digits.items()}
    often = Counter(v for values in present.values() for v in values)
    asked = lines(root / "pope" / "llava_pope_test.jsonl")
    assert len({row["question_id"] for row in asked}) == len(asked) == 6 * IMAGES
    positives = {}
    for category in ("random", "popular", "adversarial"):
        rows = lines(root / "pope" / "coco" / f"coco_pope_{category}.json")
        mine = [row for row in asked if row["category"] == category]
        assert [(r["image"], r["text"] + SHORT) for r in rows] == [(r["image"], r["text"]) for r in mine]
        assert [r["question_id"] for r in rows] == list(range(1, 2 * IMAGES + 1))
        assert Counter(r["label"] for r in rows) == {"yes": IMAGES, "no": IMAGES}
        assert len({(r["image"], r["text"]) for r in rows}) == len(rows)
        positives[category] = [(r["image"], r["text"]) for r in rows if r["label"] == "yes"]
        for row in rows:
            assert set(row) == {"question_id", "image", "text", "label"}
            assert (root / "pope" / "val2014" / row["image"]).is_file()
            assert answer_of(row["text"], digits[row["image"]]).lower() == row["label"]
            if row["label"] == "yes":
                continue
            here, value = present[row["image"]], int(re.search(r"\d", row["text"])[0])
            absent = set(range(10)) - here
            if category == "popular":
                assert often[value] == max(often[v] for v in absent)
            if category == "adversarial":
                company = {v: sum(len(here & other) for other in present.values() if v in other) for v in absent}
                assert company[value] == max(company.values())
    assert positives["random"] == positives["popular"] == positives["adversarial"]


def test_gqa_asks_short_questions(root, scenes):
    digits = by_name(scenes, export_eval.gqa_image)
    official = load(root / "gqa" / "data" / "questions" / "testdev_balanced_questions.json")
    asked = lines(root / "gqa" / "llava_gqa_testdev_balanced.jsonl")
    assert [row["question_id"] for row in asked] == list(official)
    for row in asked:
        entry = official[row["question_id"]]
        assert row == {
            "question_id": row["question_id"],
            "image": entry["imageId"] + ".jpg",
            "text": entry["question"] + SHORT,
            "category": "default",
        }
        assert (root / "gqa" / "data" / "images" / row["image"]).is_file()
        assert entry["isBalanced"] is True and set(entry["types"]) == {"structural", "semantic", "detailed"}
        assert answer_of(entry["question"], digits[entry["imageId"]]).lower() == entry["answer"]
        assert (entry["types"]["structural"] == "verify") == (entry["answer"] in {"yes", "no"})
    answers = Counter(entry["answer"] for entry in official.values())
    assert answers["yes"] == answers["no"] == IMAGES / 2
    assert len(official) >= 3 * IMAGES and len({e["types"]["semantic"] for e in official.values()}) == 3


def test_textvqa_reads_digits_with_the_scenes_ocr_tokens(root, scenes):
    digits = by_name(scenes, export_eval.textvqa_image)
    official = load(root / "textvqa" / "TextVQA_0.5.1_val.json")["data"]
    asked = lines(root / "textvqa" / "llava_textvqa_val_v051_ocr.jsonl")
    assert len(asked) == len(official) == 2 * IMAGES
    assert len({entry["question_id"] for entry in official}) == len(official)
    by_question = {(entry["image_id"], entry["question"].lower()): entry for entry in official}
    assert len(by_question) == len(official)
    given_away = 0
    for row in asked:
        question, ocr, instruction = row["text"].split("\n")
        entry = by_question[row["question_id"], question.lower()]
        here = digits[row["question_id"]]
        assert re.fullmatch(r"[0-9a-f]{16}", row["question_id"]) and "\n" + instruction == SHORT
        assert row["image"] == row["question_id"] + ".jpg"
        assert (root / "textvqa" / "train_images" / row["image"]).is_file()
        assert entry["answers"] == [answer_of(question, here)] * 10
        tokens = ocr.removeprefix("Reference OCR token: ").split(", ")
        assert sorted(tokens) == sorted(str(d.value) for d in here)
        given_away += " ".join(tokens) == entry["answers"][0]
    assert given_away < IMAGES / 2


def test_mme_holds_a_yes_and_a_no_for_every_picture(root, scenes):
    digits = by_name(scenes, export_eval.mme_image)
    home = root / "MME" / "MME_Benchmark_release_version"
    asked = lines(root / "MME" / "llava_mme.jsonl")
    categories = {path.name for path in home.iterdir()}
    assert categories == {"existence", "count", "position"} <= MME_NAMES
    official = {}
    for path in home.glob("*/*.txt"):
        image = path.with_suffix(".jpg")
        assert image.is_file()
        rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]
        assert [label for _, label in rows] == ["Yes", "No"]
        for question, label in rows:
            short = question.removesuffix(" Please answer yes or no.")
            assert short != question and answer_of(short, digits[image.name]) == label
            official[f"{path.parent.name}/{image.name}", short + SHORT] = label
    assert len(asked) == len(official) == 3 * 2 * IMAGES
    for first, second in zip(asked[::2], asked[1::2], strict=True):
        assert first["question_id"] == second["question_id"] == first["image"]
        assert [official[r["image"], r["text"]] for r in (first, second)] == ["Yes", "No"]
        assert first["category"] == first["image"].split("/")[0]


def test_scienceqa_has_questions_with_and_without_pictures(root, scenes):
    digits = by_name(scenes, export_eval.scienceqa_id)
    problems, splits = load(root / "scienceqa" / "problems.json"), load(root / "scienceqa" / "pid_splits.json")
    rows = load(root / "scienceqa" / "llava_test_CQM-A.json")
    assert [row["id"] for row in rows] == splits["test"] and len(rows) == 2 * IMAGES
    assert set(problems) == {name for names in splits.values() for name in names}
    assert len(problems) > len(rows)
    assert all(problem["split"] == split for split, names in splits.items() for problem in map(problems.get, names))
    for name, problem in problems.items():
        assert fitting(problem["question"], problem["choices"], digits.get(name, ())) == [problem["answer"]]
        assert problem["hint"] == "" and problem["image"] in (None, "image.png")
    for row in rows:
        problem = problems[row["id"]]
        human, gpt = row["conversations"]
        listed = [f"{letter}. {choice}" for letter, choice in zip("ABCDE", problem["choices"], strict=False)]
        mark = "<image>\n" if "image" in row else ""
        assert (human["from"], gpt["from"]) == ("human", "gpt")
        assert human["value"] == mark + "\n".join([problem["question"], *listed])
        assert gpt["value"] == "ABCDE"[problem["answer"]]
        assert row.get("image") == (f"{row['id']}/image.png" if problem["image"] else None)
    seen = [row for row in rows if "image" in row]
    assert len(seen) == IMAGES and all((root / "scienceqa/images/test" / row["image"]).is_file() for row in seen)
    assert Counter(r["conversations"][1]["value"] for r in seen) == dict.fromkeys("ABCD", IMAGES // 4)


def test_seed_bench_has_lettered_questions_of_several_types(root, scenes):
    digits = by_name(scenes, export_eval.seed_image)
    official = load(root / "seed_bench" / "SEED-Bench.json")
    asked = lines(root / "seed_bench" / "llava-seed-bench.jsonl")
    entries = official["questions"]
    assert [row["question_id"] for row in asked] == [int(entry["question_id"]) for entry in entries]
    letters = {}
    for row, entry in zip(asked, entries, strict=True):
        options = [entry[f"choice_{letter}"] for letter in "abcd"]
        listed = "".join(f"\n{letter}. {option}" for letter, option in zip("ABCD", options, strict=True))
        assert row["text"] == entry["question"] + listed + LETTER
        assert row["image"] == f"SEED-Bench-image/{entry['data_id']}" and entry["data_type"] == "image"
        assert (root / "seed_bench" / row["image"]).is_file()
        assert row["category"] == entry["question_type_id"]
        assert fitting(entry["question"], options, digits[entry["data_id"]]) == ["ABCD".index(entry["answer"])]
        letters.setdefault(entry["question_type_id"], Counter())[entry["answer"]] += 1
    assert set(letters) == set(official["question_type"].values()) == {2, 3, 5, 6, 9}
    for counts in letters.values():
        assert max(counts[letter] for letter in "ABCD") - min(counts[letter] for letter in "ABCD") <= 1


def test_questions_can_be_spelled_by_the_tiny_tokenizer(root):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(export_eval.__file__).parent / "weights" / "llm" / "tokenizer.json"))
    texts = {row["text"] for path in root.glob("*/*.jsonl") for row in lines(path)}
    texts |= {r["conversations"][0]["value"] + LETTER for r in load(root / "scienceqa" / "llava_test_CQM-A.json")}
    spelled = Counter(t for text in texts for t in tokenizer.encode(text, add_special_tokens=False).tokens)
    assert spelled["<unk>"] == 0
    assert {token for token in spelled if token.startswith("<0x")} == {"<0x0A>"}


def test_questions_are_worded_as_in_training():
    digits = make_scene("heldout", 1, 0).digits
    rng = np.random.default_rng(0)
    trained = {ask("exists", digits, rng)[0] for _ in range(400)}
    assert {text for _ in range(200) for text in claim_pair("existence", digits, rng)} == trained
    trained = {ask("relation", digits, rng)[0] for _ in range(400)}
    assert {quiz("relation", digits, rng).question for _ in range(400)} == trained


BENCHMARKS = {
    **{"pope": 100, "gqa": 100, "textvqa": 100, "textvqa_no_ocr": 100, "mme": 3 * 200},
    **{"scienceqa": 100, "scienceqa_img": 100, "seed_image": 100},
}


def right_and_wrong(question, digits):
    """What a perfect model answers, and what a model says that is always wrong."""
    bare = question.text.removesuffix(SHORT).removesuffix(LETTER).split("\nReference OCR token: ")[0]
    assert bare != question.text
    asked, *options = bare.split("\n")
    if options:
        place = fitting(asked, [option[3:] for option in options], digits)[0]
        return "ABCD"[place], "ABCD"[(place + 1) % len(options)]
    answer = answer_of(asked, digits)
    return answer, {"Yes": "No", "No": "Yes"}.get(answer, "x")


@pytest.mark.parametrize("keyed", [True, False], ids=["ours", "llava"])
@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_task_scores_perfect_answers_in_full_and_wrong_ones_with_nothing(root, scenes, name, keyed):
    task = TASKS.get(name)()
    here = {root / file: scene.digits for i, scene in enumerate(scenes) for file in export_eval.image_files(i)}
    assert all(needed.path.exists() for needed in task.needed(root))
    questions = task.questions(root)
    assert len({question.key for question in questions}) == len(questions) >= IMAGES
    said = [right_and_wrong(q, here[q.visuals[0]] if q.visuals else ()) for q in questions]
    for number, expected in enumerate((BENCHMARKS[name], 0)):
        key = (lambda q: q.key) if keyed else (lambda q: "")
        answers = [Answer(q.question_id, q.text, s[number], key(q)) for q, s in zip(questions, said, strict=True)]
        score = task.score(root, answers)
        assert (score.value, score.missing, score.expected) == (expected, [], len(questions))
        assert number or not score.unparsed


@pytest.mark.parametrize("name", sorted(BENCHMARKS.keys() - {"textvqa"}))  # its OCR tokens are in LLaVA's file only
def test_tasks_ask_the_same_without_llavas_question_files(root, tmp_path, name):
    bare = tmp_path / "eval"
    shutil.copytree(root, bare, ignore=shutil.ignore_patterns("*.jpg", "*.png", "SEED-Bench-image", "llava*"))
    task = TASKS.get(name)()
    with_files, without = (task.questions(folder) for folder in (root, bare))
    asked = [[(str(q.question_id), q.text, q.category) for q in found] for found in (with_files, without)]
    assert sorted(asked[0]) == sorted(asked[1])


def digest(folder):
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}


def test_the_same_arguments_write_the_same_bytes(tmp_path):
    for name, workers, seed in (("one", 1, 3), ("two", 2, 3), ("other", 1, 4)):
        export(tmp_path / name, 5, seed, workers)
    one, two, other = (digest(tmp_path / name) for name in ("one", "two", "other"))
    assert one == two and set(one) == set(other)
    assert not [name for name in one if name.endswith((".jpg", ".png", ".jsonl")) and one[name] == other[name]]
    export(tmp_path / "one", 5, 3)
    assert digest(tmp_path / "one") == one


def test_a_folder_with_other_benchmarks_is_left_alone(tmp_path):
    (tmp_path / "real" / "gqa").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"already holds gqa, not from here; choose an empty --out"):
        export(tmp_path / "real", 1, 0)
    assert [path.name for path in (tmp_path / "real").rglob("*")] == ["gqa"]
    export(tmp_path / "tiny", 2, 0)
    with pytest.raises(ValueError, match=r"tiny_world\.json is of an export with other arguments"):
        export(tmp_path / "tiny", 1, 0)
    with pytest.raises(ValueError, match=r"images must be at least 1"):
        export(tmp_path / "none", 0, 0)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(("make", "message"), [(claim_pair, "claim kind is 'colour'"), (quiz, "quiz kind is 'colour'")])
def test_unknown_kinds_of_questions_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make("colour", make_scene("heldout", 1, 0).digits, np.random.default_rng(0))
