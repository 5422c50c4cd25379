"""Sentence frames: a meaning (a frame, an intent, one concept a slot) and the sentences that say it.

A template names its slots in braces; `{x}` takes any word of the concept, `{x.0}` and `{x.1}` the more and the less side
of a dimension. All templates of one intent mean the same; two intents of one frame never do.
"""

import random
import re
from dataclasses import dataclass, replace

from qwen_qlora.data.text_matching import words


@dataclass(frozen=True)
class Frame:
    """Templates by intent, the concepts of every slot, and the pairs of slots that draw from one list."""

    name: str
    slots: dict[str, tuple]
    intents: dict[str, tuple[str, ...]]
    swaps: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Meaning:
    """What a sentence says: equal meanings are paraphrases, different ones are not; `choice` is (slot, concept) pairs."""

    frame: str
    intent: str
    choice: tuple[tuple[str, int], ...]


FRAMES = {
    frame.name: frame
    for frame in (
        Frame(
            "service",
            {"act": words.ACTIONS, "obj": words.SERVICES},
            {
                "how": (
                    "怎么{act}{obj}", "如何{act}{obj}", "{obj}怎么{act}", "{obj}要怎样{act}", "{act}{obj}的步骤是什么", "请问{act}{obj}该怎么操作", "想{act}{obj}，应该怎么做",
                ),
                "cost": ("{act}{obj}要多少钱", "{act}{obj}的费用是多少", "{obj}{act}一次收多少费", "{act}{obj}得花多少钱", "{obj}{act}怎么收费"),
                "time": ("{act}{obj}要多久", "{act}{obj}需要多长时间", "{obj}{act}几天能好", "{act}{obj}得等多久", "{obj}{act}多久生效"),
                "where": ("在哪里{act}{obj}", "哪里可以{act}{obj}", "{act}{obj}去哪儿办", "{obj}到什么地方{act}", "{act}{obj}该去哪个窗口"),
                "fail": ("为什么{act}不了{obj}", "{obj}{act}失败是什么原因", "{obj}怎么没法{act}", "{act}{obj}总是不成功是怎么回事", "{obj}{act}不成功的原因"),
                "need": ("{act}{obj}要带什么材料", "{act}{obj}需要哪些证件", "{obj}{act}要准备什么", "{act}{obj}得提供什么资料", "去{act}{obj}应该带哪些东西"),
            },
        ),
        Frame(
            "route",
            {"a": words.PLACES, "b": words.PLACES},
            {
                "how": (
                    "从{a}到{b}怎么走", "到{b}怎么走，我在{a}", "人在{a}，想去{b}，怎么走", "{a}去{b}的路线", "去{b}，从{a}出发怎么走", "我要从{a}去{b}，走哪条路",
                ),
                "far": ("从{a}到{b}有多远", "{a}离{b}的路程，从{a}出发算", "从{a}出发去{b}要走多少公里", "到{b}有几公里，起点是{a}", "{a}去{b}的距离是多少"),
                "fare": ("从{a}打车到{b}多少钱", "打车去{b}要多少钱，从{a}上车", "{a}去{b}的出租车费用", "在{a}叫车去{b}，车费多少", "从{a}坐出租车去{b}花多少钱"),
                "bus": ("从{a}到{b}坐几路公交", "在{a}坐哪路公交能到{b}", "去{b}，从{a}坐什么公交车", "{a}开往{b}的公交是几路", "坐公交从{a}去{b}，坐哪一路"),
            },
            (("a", "b"),),
        ),
        Frame(
            "compare",
            {"a": words.GOODS, "b": words.GOODS, "dim": words.DIMENSIONS},
            {
                "ask": ("{a}比{b}{dim.0}吗", "{b}比{a}{dim.1}吗", "和{b}相比，{a}更{dim.0}吗", "跟{a}比起来，{b}是不是更{dim.1}", "是不是{a}比{b}更{dim.0}", "{b}是不是比{a}{dim.1}"),
                "why": ("为什么{a}比{b}{dim.0}", "{b}为什么比{a}{dim.1}", "{a}比{b}{dim.0}是什么原因", "和{a}相比，{b}更{dim.1}的原因", "{a}怎么会比{b}{dim.0}"),
"since": ("{a}什么时候开始比{b}{dim.0}的", "{b}从什么时候起比{a}{dim.1}", "从哪一年开始{a}比{b}{dim.0}", "{a}是从何时起比{b}{dim.0}的", "{b}何时变得比{a}{dim.1}了"),
            },
            (("a", "b"),),
        ),
        Frame(
            "give",
            {"a": words.PEOPLE, "b": words.PEOPLE, "t": words.THINGS},
            {
                "lend": ("{a}把{t}借给了{b}", "{b}向{a}借了{t}", "{b}从{a}那里借来了{t}", "{t}是{a}借给{b}的", "{t}是{b}找{a}借的", "{a}借给{b}{t}"),
                "sell": ("{a}把{t}卖给了{b}", "{b}从{a}手里买了{t}", "{t}是{b}跟{a}买的", "{a}卖给{b}{t}", "{t}被{a}卖给了{b}"),
                "send": ("{a}把{t}寄给了{b}", "{b}收到了{a}寄来的{t}", "{t}是{a}寄给{b}的", "{a}给{b}寄去了{t}", "{b}收到{t}，是{a}寄的"),
                "owe": ("{a}还没把{t}还给{b}", "{b}还没收回{a}该还的{t}", "{t}，{a}到现在还没还给{b}", "{a}欠{b}{t}没有还", "{b}等着{a}归还{t}"),
            },
            (("a", "b"),),
        ),
        Frame(
            "schedule",
            {"e": words.EVENTS, "f": words.TIMES, "t": words.TIMES},
            {
                "move": ("{e}从{f}改到了{t}", "{e}原定{f}，现在改成{t}", "原来{f}的{e}调整到{t}", "{e}改在{t}，不是{f}了", "{t}才{e}，{f}那次不算了"),
                "ask": ("{e}是{f}还是{t}，我记得是{t}", "我记得{e}在{t}而不是{f}，对吗", "{e}不是{f}，应该是{t}吧", "{e}应该在{t}，不在{f}，对不对"),
            },
            (("f", "t"),),
        ),
        Frame(
            "fault",
            {"d": words.DEVICES, "p": words.FAULTS},
            {
                "fix": ("{d}{p}怎么办", "{d}{p}，该怎么处理", "{p}的{d}怎么修", "我家{d}{p}，有什么办法", "遇到{d}{p}应该怎么解决"),
                "why": ("{d}为什么{p}", "{d}{p}是什么原因", "是什么让{d}{p}", "{d}怎么会{p}", "{d}{p}的原因有哪些"),
                "cost": ("{d}{p}，修一下多少钱", "修{p}的{d}要花多少钱", "{d}{p}的维修费用是多少", "{d}{p}，维修怎么收费"),
                "bought": ("新买的{d}{p}能退吗", "刚买的{d}{p}，可以退货吗", "{d}才买就{p}，能不能退", "买来的新{d}{p}，支持退货吗"),
            },
        ),
        Frame(
            "advice",
            {"w": words.WHO, "v": words.ACTIVITIES},
            {
                "may": ("{w}可以{v}吗", "{w}能不能{v}", "{v}对{w}来说行不行", "{w}{v}有没有问题", "{w}{v}要紧吗"),
                "must": ("{w}必须{v}吗", "{w}是不是一定要{v}", "{w}不{v}行不行", "{w}非得{v}吗", "{v}对{w}是必需的吗"),
                "whynot": ("{w}为什么不能{v}", "{w}不可以{v}的原因", "为什么不让{w}{v}", "{w}不能{v}，这是为什么", "{w}怎么就不能{v}"),
                "when": ("{w}什么时候{v}最好", "{w}在哪个时间{v}合适", "{w}几点{v}比较好", "{w}{v}选什么时段好"),
                "good": ("{w}{v}有什么好处", "{v}对{w}有哪些益处", "{w}{v}好在哪里", "{w}常常{v}有哪些好的作用"),
            },
        ),
    )
}  # fmt: skip

PLACEHOLDER = re.compile(r"\{(\w+)(?:\.(\d))?\}")


def draw_meaning(rng: random.Random) -> Meaning:
    """A random meaning; slots that draw from one list get different concepts."""
    frame = FRAMES[rng.choice(list(FRAMES))]
    choice = {slot: rng.randrange(len(concepts)) for slot, concepts in frame.slots.items()}
    for first, second in frame.swaps:
        while choice[second] == choice[first]:
            choice[second] = rng.randrange(len(frame.slots[second]))
    return Meaning(frame.name, rng.choice(list(frame.intents)), tuple(choice.items()))


def near_miss(meaning: Meaning, rng: random.Random) -> Meaning:
    """A meaning that differs in one thing only: two slots exchanged, another concept in a slot, or another intent."""
    frame, choice = FRAMES[meaning.frame], dict(meaning.choice)
    changes = ["intent", "slot"] + ["swap"] * 2 * bool(frame.swaps)
    change = rng.choice(changes)
    if change == "swap":
        first, second = rng.choice(frame.swaps)
        choice[first], choice[second] = choice[second], choice[first]
    elif change == "slot":
        slot = rng.choice(list(choice))
        taken = {choice[other] for pair in frame.swaps if slot in pair for other in pair} | {choice[slot]}
        choice[slot] = rng.choice([i for i in range(len(frame.slots[slot])) if i not in taken])
    else:
        intent = rng.choice([name for name in frame.intents if name != meaning.intent])
        return replace(meaning, intent=intent)
    return replace(meaning, choice=tuple(choice.items()))


def render(meaning: Meaning, rng: random.Random) -> str:
    """One sentence that says `meaning`: a random template with a random word for every slot."""
    frame, choice = FRAMES[meaning.frame], dict(meaning.choice)
    chosen: dict[str, str] = {}

    def word(match: re.Match) -> str:
        slot, side = match[1], match[2]
        concept = frame.slots[slot][choice[slot]]
        if match[0] not in chosen:
            chosen[match[0]] = rng.choice(concept[int(side)] if side else concept)
        return chosen[match[0]]

    return PLACEHOLDER.sub(word, rng.choice(frame.intents[meaning.intent]))
