"""The words of the page. It speaks Chinese, as the model does."""

TITLE = "心理咨询对话"
NOTICE = (
    "模型的回答不是医疗建议，也可能出错，不能代替医生或心理咨询师。"
    "如果您有伤害自己的念头，请立即拨打心理援助热线 **12356**（24 小时），紧急情况请拨打 120 或 110。"
)
PLACEHOLDER = "### 您好，我在听\n\n在下面写下您的问题，或者选一个例子开始。"
EXAMPLES = (
    "最近总是睡不好，躺下就胡思乱想，怎么办？",
    "和父母一说话就吵架，我该怎么跟他们沟通？",
    "考试前特别紧张，有什么办法可以放松？",
    "刚换了新工作，总担心自己做不好。",
)
QUESTION = "写下您的问题，回车发送"
NEW, DELETE, HISTORY = "新对话", "删除这个对话", "对话记录"
KEPT_HERE = "对话只保存在这个浏览器里。点赞或点踩时，到那条回答为止的对话会记入服务器的日志。"
MARKDOWN, JSON = "导出 Markdown", "导出 JSON"
SETTINGS = "系统提示与采样"
SYSTEM, SYSTEM_HINT = "系统提示", "例如：你是一位温和的心理咨询师。留空则不使用。"
RECOMMENDED, RECOMMENDED_HINT = "使用模型推荐的采样设置", "取消后，温度和 top_p 才起作用"
TEMPERATURE, TEMPERATURE_HINT = "温度", "0 总是选最可能的词，越大越随机"
TOP_P, TOP_P_HINT = "top_p", "只从累计概率达到该值的词里选"
MAX_TOKENS, MAX_TOKENS_HINT = "回答的最大长度", "单位：词元"
# What gradio itself says on this page: it has no Chinese for some of it, and follows the browser's language.
GRADIO = {
    "chatbot.copy_message": "复制",
    "chatbot.copied_message": "已复制",
    "chatbot.edit": "编辑",
    "chatbot.submit": "发送",
    "chatbot.cancel": "取消",
    "chatbot.retry": "重试",
    "chatbot.undo": "撤销",
    "chatbot.like": "赞",
    "chatbot.dislike": "踩",
    "chatbot.clear": "清空对话",
}

THANKS = "谢谢您的反馈，已记录"

USER, ASSISTANT, UNTITLED = "用户", "模型", "新对话"

MODEL = "模型：{model}"
NO_SERVICE = "连不上模型服务 {url}。请先启动它：make baichuan-serve BG=1"
WAITING = "等待回答… {seconds:.0f} 秒"
RUNNING = "{tokens} 个词元 · {speed:.1f} 词元/秒"
DONE = "{tokens} 个词元 · {speed:.1f} 词元/秒 · 首字 {first:.2f} 秒"
STOPPED = "已停止"
TOO_LONG = "（达到最大长度）"
DROPPED = "对话超过了模型的上下文，最早的 {turns} 轮没有发送"
QUEUE_FULL = "排队已满，这个问题没有发送，文字保留在输入框里。请{seconds}再试。"
IN_SECONDS, LATER = " {seconds:.0f} 秒后", "稍后"
NOT_READY = "模型服务还没有准备好（正在加载或正在关闭），文字保留在输入框里，请稍后再试。"
NO_KEY = "模型服务要求密钥。请在 .env 里设置 API_KEY，与服务的相同。"
TOO_LONG_QUESTION = "问题加上回答超出了模型的上下文。请缩短问题，或减小“回答的最大长度”。（{message}）"
REFUSED = "模型服务没有接受这个问题（{status}）：{message}"
BROKEN_OFF = "回答中断了：{message}"
EMPTY = "模型没有给出回答。"
