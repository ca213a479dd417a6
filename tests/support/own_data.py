"""Write data of our own in the shapes of public data sets: alpaca, ShareGPT pairs and tool calls, Parquet files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# (thing, its use), (物, 用处): enough to make rows that all differ
THINGS = (
    ("a kettle", "boil water"), ("a rake", "gather leaves"), ("a lamp", "read at night"), ("a sieve", "sift flour"),
    ("a compass", "find north"), ("an anvil", "shape iron"), ("a loom", "weave cloth"), ("a sundial", "tell the hour"),
)  # fmt: skip
OBJECTS = (
    ("水壶", "烧水"), ("耙子", "收拢落叶"), ("台灯", "夜里看书"), ("筛子", "筛面粉"),
    ("罗盘", "辨认北方"), ("铁砧", "打铁"), ("织布机", "织布"), ("日晷", "看时辰"),
)  # fmt: skip
ASKED = (
    ("What is {0} for?", "With {0} you {1}."),
    ("Name one use of {0}.", "One use: to {1}.\n\nThere are others, e.g. as a gift."),
    ("Could I {1} with {0}?", "Yes, that's what it is made for — try it!"),
    ("{0}有什么用？", "{0}可以用来{1}。"),
    ("怎么用{0}来{1}？\n请分两步说。", "1. 先准备好{0}；\n2. 然后慢慢{1}，不要着急。"),
    ("用一句话介绍{0}（20 字以内）", "“{0}”：{1}的工具 👍"),
    ("没有{0}，还能{1}吗？", "能，但是会慢 3 倍左右。"),
)


def talks() -> list[tuple[str, str]]:
    """56 questions and their answers."""
    return [
        (question.format(*words), answer.format(*words))
        for i, (question, answer) in enumerate(ASKED)
        for words in (THINGS if i < 3 else OBJECTS)
    ]


def alpaca_rows() -> list[dict[str, str]]:
    """Rows of instruction, input and output; every fourth has an input."""
    return [
        {"instruction": question, "input": "" if i % 4 else f"备注 {i}: short, please", "output": answer}
        for i, (question, answer) in enumerate(talks())
    ]


def identity_rows() -> list[dict[str, str]]:
    """Rows with the placeholders that a user is meant to fill."""
    return [
        {"instruction": f"{question} ({i})", "input": "", "output": f"I am {{{{name}}}}, built by {{{{author}}}}. {i}"}
        for i, question in enumerate(["who are you?", "你是谁？", "what's your name", "谁开发了你"] * 13)
    ]


def ranking_rows() -> list[dict[str, Any]]:
    """ShareGPT pairs; every third begins with a system turn."""
    rows = []
    for i, (question, answer) in enumerate([*talks(), *talks()[:8]]):
        system = [{"from": "system", "value": "回答要简短。"}] * (i % 3 == 0)
        rows.append(
            {
                "conversations": [*system, {"from": "human", "value": f"{i}. {question}"}],
                "chosen": {"from": "gpt", "value": answer},
                "rejected": {"from": "gpt", "value": f"{answer[: i % 7]}不知道 (I don't know)."},
            }
        )
    return rows


def tool_rows() -> list[dict[str, Any]]:
    """ShareGPT talks of which two in three call a function, whose list is a text of JSON."""
    tool = {
        "name": "look_up",
        "description": "查一件东西的用处",
        "parameters": {"type": "object", "properties": {"thing": {"type": "string"}, "many": {"type": "integer"}}},
    }
    rows = []
    for i, (question, answer) in enumerate([*talks(), *talks()]):
        turns = [("human", f"{question} #{i}"), ("gpt", answer)]
        if i % 3:
            call = {"name": "look_up", "arguments": {"thing": f'<{i}> & "{question[:4]}"', "many": i % 5}}
            turns[1:1] = [
                ("function_call", json.dumps(call, ensure_ascii=False)),
                ("observation", json.dumps({"used": answer[:9], "found": i % 2 == 0}, ensure_ascii=False)),
            ]
            turns += [("human", "再查一次"), *turns[1:3], ("gpt", "没有变化。")]
        rows.append(
            {
                "conversations": [{"from": role, "value": text} for role, text in turns],
                "tools": json.dumps([tool], ensure_ascii=False) if i % 3 else "[]",
            }
        )
    return rows


def write_parquets(folder: Path) -> None:
    """Talks in two files that disagree on their other columns, pairs whose answers repeat the prompt, texts."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir()
    said = [
        [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        + [{"from": "human", "value": "还有吗？"}, {"from": "gpt", "value": f"No. ({i})"}] * (i % 3)
        for i, (question, answer) in enumerate(talks())
    ]
    label = [{"ability": ["explain"], "place": str(i)} for i in range(len(said))]
    numbered = {"id": list(range(len(said))), "conversations": said, "label": label, "reward": [0.5] * len(said)}
    named = {"id": [f"a{i:03}" for i in range(len(said))], "source": ["ours"] * len(said), "conversations": said[::-1]}
    pq.write_table(pa.table(numbered), folder / "sft_7M.parquet")
    pq.write_table(pa.table(named), folder / "sft_Gen.parquet")
    pairs = [
        {
            "task_category": "uses",
            "prompt": question,
            "chosen": [{"content": question, "role": "user"}, {"content": answer, "role": "assistant"}],
            "rejected": [{"content": question, "role": "user"}, {"content": f"不。{i}", "role": "assistant"}],
            "id": i,
        }
        for i, (question, answer) in enumerate(talks())
    ]
    pq.write_table(pa.Table.from_pylist(pairs), folder / "dpo_train.parquet")
    texts = [{"text": f"{question}\n{answer}", "num_words": len(question), "_id": 7} for question, answer in talks()]
    pq.write_table(pa.Table.from_pylist(texts), folder / "pt_zh.parquet")


def write_own_data(folder: Path) -> Path:
    """A folder with the files of the public one, under the same names."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        "alpaca_zh_demo": alpaca_rows(),
        "identity": identity_rows(),
        "dpo_zh_demo": ranking_rows(),
        "glaive_toolcall_zh_demo": tool_rows(),
    }
    for name, rows in files.items():
        (folder / f"{name}.json").write_text(json.dumps(rows, ensure_ascii=False, indent=2), encoding="utf-8")
    write_parquets(folder / "mini_qwen")
    return folder
