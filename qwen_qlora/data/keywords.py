"""The bundled keyword task: short passages on a topic and the terms they are about, in order of appearance."""

import random

TOPICS: dict[str, tuple[str, ...]] = {
    "光伏发电": ("硅片", "逆变器", "并网", "储能电池", "转换效率", "屋顶电站", "补贴政策"),
    "冷链物流": ("冷藏车", "温度记录", "预冷", "保鲜期", "配送中心", "损耗率", "疫苗运输"),
    "小麦种植": ("播种量", "返青水", "条锈病", "赤霉病", "测土配方", "机收损失", "千粒重"),
    "城市排水": ("雨水管网", "内涝点", "泵站", "透水铺装", "海绵城市", "污水处理厂", "管道检测"),
    "机器翻译": ("平行语料", "注意力机制", "词表", "术语一致性", "低资源语言", "译后编辑", "评测指标"),
    "糖尿病管理": ("血糖监测", "胰岛素", "饮食记录", "足部护理", "家庭医生", "运动处方", "并发症筛查"),
    "古建筑修缮": ("斗拱", "榫卯", "彩画", "三维扫描", "糟朽木件", "传统工匠", "预防性保护"),
    "网络安全": ("弱口令", "钓鱼邮件", "漏洞补丁", "访问控制", "数据备份", "应急演练", "日志审计"),
    "高铁运营": ("时刻表", "动车组检修", "接触网", "客流预测", "电子客票", "调度指挥", "候车秩序"),
    "青少年阅读": ("绘本", "亲子共读", "校园图书角", "分级书单", "读书笔记", "电子书", "阅读习惯"),
    "海水养殖": ("网箱", "赤潮预警", "溶解氧", "苗种繁育", "饵料投喂", "病害防控", "碳汇渔业"),
    "垃圾分类": ("厨余垃圾", "可回收物", "投放时间", "智能回收箱", "焚烧发电", "社区督导员", "积分奖励"),
}  # fmt: skip

SENTENCES = (
    "这份材料先讲{t}的现状，", "基层反映最多的问题是{t}，", "专家建议从{t}入手，", "今年的经费主要用在{t}上，", "与去年相比，{t}有了明显改善，", "不少地方把{t}列为重点，",
    "要做好这项工作，离不开{t}，", "记者走访时注意到{t}，", "下一步还要在{t}上多下功夫，", "业内普遍认为{t}是关键一环，",
)  # fmt: skip
FILLERS = (
    "大家的看法并不完全一样。",
    "会后还进行了讨论。",
    "这需要一点一点来。",
    "类似的经验已经整理成册。",
    "多数人对此表示支持。",
)
PROMPTS = (
    "请提取下面这段话的关键词，用顿号隔开。\n{passage}", "阅读短文，列出其中的关键词，以“、”分隔。\n短文：{passage}", "{passage}\n以上内容的关键词有哪些？只写关键词，用顿号连接。",
)  # fmt: skip


def draw_example(rng: random.Random) -> tuple[str, str]:
    """(prompt, answer): a passage that opens with its topic and mentions two to four of its terms."""
    topic = rng.choice(list(TOPICS))
    terms = rng.sample(TOPICS[topic], rng.randint(2, 4))
    clauses = [sentence.format(t=term) for sentence, term in zip(rng.sample(SENTENCES, len(terms)), terms, strict=True)]
    passage = f"近日，一场关于{topic}的座谈会召开。" + "".join(clauses) + rng.choice(FILLERS)
    return rng.choice(PROMPTS).format(passage=passage), "、".join([topic, *terms])


def draw_examples(count: int, rng: random.Random) -> list[tuple[str, str]]:
    """`count` examples with distinct prompts."""
    examples: dict[str, str] = {}
    while len(examples) < count:
        prompt, answer = draw_example(rng)
        examples.setdefault(prompt, answer)
    return list(examples.items())
