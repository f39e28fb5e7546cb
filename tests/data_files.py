"""Files of pictures, questions and answers, as users have them: for the tests of data sets."""

import io
import json

import numpy as np
from PIL import Image

from tasks import DiceSum
from tasks.dataset import STYLES, DatasetTask

DICE = [DiceSum().example_at(i) for i in range(40)]


def stored(image, kind="PNG", **options):
    """A picture as bytes."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def opened(content):
    return Image.open(io.BytesIO(content))


def jsonl(path, rows):
    """A file of JSON lines. -> its path"""
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return str(path)


def geometry_rows(rows):
    """(pictures as bytes, question, answer) as rows in the layout of hiyouga/geometry3k."""
    laid_out = []
    for images, problem, answer in rows:
        images = [{"bytes": content, "path": None} for content in images]
        laid_out.append({"images": images, "problem": problem, "answer": answer})
    return laid_out


def geometry_table(rows):
    """The same as a table of `datasets`, whose features say that the pictures are pictures."""
    import datasets

    features = datasets.Features(
        images=datasets.List(datasets.Image()),
        problem=datasets.Value("string"),
        answer=datasets.Value("string"),
    )
    return datasets.Dataset.from_list(geometry_rows(rows), features=features)


def geometry(path, rows):
    """The same as a parquet file. -> its path"""
    geometry_table(rows).to_parquet(str(path))
    return str(path)


def dice_rows():
    """Pictures of dice, numbered in the question."""
    rows = []
    for i, one in enumerate(DICE):
        rows.append(([stored(one.image)], f"<image>{one.question} ({i})", one.answer))
    return rows


def additions(count=30):
    """Rows without pictures."""
    return [{"question": f"Add {i} and 1.", "answer": i + 1} for i in range(count)]


def only(task):
    """A row of a task whose rows are all alike, and so all in one split."""
    return task.sample(np.random.default_rng(0))


def rows_of(task, split):
    """{row number: example} of a split."""
    examples = [task.example_at(i, split) for i in range(task.size(split))]
    return {int(one.key.split("/")[1]): one for one in examples}


def skipped(task):
    """{row number: why it is not used} of the source of the training rows."""
    rows, _ = task._rows("train")
    return rows.skipped


def styled_tasks(folder):
    """{style: a task}"""
    path = jsonl(folder / "rows.jsonl", additions())
    return {style: DatasetTask(path, style=style) for style in STYLES}
