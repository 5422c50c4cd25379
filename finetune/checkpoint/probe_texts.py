"""A few hundred strings on which a converted tokenizer must agree with the published one.

Words of several scripts, emoji, composed and decomposed forms, whitespace, numbers, code and look-alikes of special
tokens, alone and in contexts that move the borders between tokens.
"""

import unicodedata

WORDS = (
    "你好，世界！ 今天天气怎么样？ 我最近总是睡不着，该怎么办 请判断：“他走了”和“他离开了”意思相同吗 關鍵詞：機器學習 "
    "東京タワーはとても高いです 안녕하세요 반갑습니다 สวัสดีครับ नमस्ते दुनिया שלום עולם مرحبا بالعالم "
    "Привет мир Γειά σου Κόσμε Xin chào thế giới naïve café über straße İstanbul ﬁnance Ⅷ ① ㍿ ﾊﾝｶｸ Ａｌｐｈａ "
    "don't we'll THEY'RE I'm he'd O'Reilly's it's_fine CamelCase snake_case kebab-case HTTP2Server x86_64 "
    "1234567890 3.14159 1,000,000 -42 +7 1e-9 0xFF ２０２３年 12:34:56 ￥19.90 50% ½ ³ "
    "👍 👨‍👩‍👧‍👦 🇨🇳 👋🏽 🏳️‍🌈 ☺️ ♥ → ≠ ∑ √2 ∞ "
    "\u0000 \u001b[0m \u00ad \u200b \u200d \ufeff \ufffd \U000e0041 \ue000 𠀀𠮷 "
    "https://example.com/a?b=c&d=%E4%BD%A0 user@example.com C:\\Users\\me /root/autodl-tmp "
    "<|endoftext|> <|im_start|> <|im_end|> <|extra_0|> <|extra_204|> <|extra_205|> <|im_start|>user <|im_end <im_end|> "
    "<unk> <s> </s> <reserved_106> <reserved_107> <reserved_1000> <0x41> <html> <p> </p> ▁ ▁你 "
    "... ``` --- == != ?! ；： 【】 《书》 ——"
).split(" ")

TEXTS = (
    "",
    " ",
    "  ",
    "\n",
    "\n\n",
    "\r\n",
    "\t",
    " \n ",
    "\n \n",
    "   leading and trailing   ",
    "a  b   c    d",
    "全角　空格",
    "line one\nline two\r\n\r\nline three\n",
    "def f(x: int) -> dict:\n    return {'a': x**2, \"b\": [1, 2, 3]}  # comment\n",
    "SELECT * FROM t WHERE a >= 10 AND b LIKE '%你好%';",
    '{"conversation": [{"human": "你好", "assistant": "您好！"}], "dataset": null}',
    "```python\nprint('hi')\n```\n",
    '<div class="x">\n\t<p>段落</p>\n</div>',
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n你好<|im_end|>\n"
    "<|im_start|>assistant\n",
    "<reserved_106>你好<reserved_107>您好</s>",
    "The quick brown fox jumps over the lazy dog. 敏捷的棕色狐狸跳过了懒狗。",
    "哈哈哈哈哈哈哈哈哈哈哈哈",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "ﷺ ﬀ ǆ Å Å Ω Ω ẛ̣ 가 각 が が",
)


def probe_texts() -> list[str]:
    """The strings, without repetitions, in a fixed order."""
    texts = [*TEXTS]
    for i, word in enumerate(WORDS):
        neighbour = WORDS[(i + 7) % len(WORDS)]
        texts += [word, f" {word}", f"{word}\n{neighbour}", f"{neighbour}{word} "]
    for text in (*TEXTS, *WORDS):
        texts += [unicodedata.normalize(form, text) for form in ("NFD", "NFKC")]
    return list(dict.fromkeys(texts))
