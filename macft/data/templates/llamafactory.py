"""List LLaMA-Factory's template names and the strings that each puts around the contents.

Adapters and configs of LLaMA-Factory refer to templates by these names. The strings may contain {content}, {bos} and
{eos}; `slots.named_source` turns them into Jinja.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Slots:
    """What is rendered around each content. `head` opens an answer, `answer` is what is trained on."""

    user: str
    head: str = ""
    answer: str = "{content}{eos}"
    system: str = "{content}"
    prefix: str = ""
    default_system: str = ""
    # the system text opens the first question instead of standing before it
    system_in_user: bool = False
    # the eos token follows only the last answer
    eos_once: bool = False
    # tools are described, called and answered as in Qwen2.5 (Hermes' tags)
    tools: bool = False
    # what opens and closes a thought: earlier answers lose theirs, the last one gets an empty one if needed
    thought: tuple[str, str] | None = None
    empty_thought: str = ""


_THINK = ("<think>\n", "\n</think>\n\n")
_TAGS = ("<think>", "</think>")
_HELPFUL = "You are a helpful assistant."
_CURIOUS = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def _chatml(end: str = "<|im_end|>\n", user: str = "user", head: str = "assistant") -> Slots:
    return Slots(
        user="<|im_start|>" + user + "\n{content}" + end,
        head="<|im_start|>" + head + "\n",
        answer="{content}" + end,
        system="<|im_start|>system\n{content}" + end,
    )


def _headed(left: str, right: str, end: str, *, user: str = "user", head: str = "assistant") -> Slots:
    """Every turn is a header with the role, the content, and an end token."""
    return Slots(
        user=left + user + right + "{content}" + end,
        head=left + head + right,
        answer="{content}" + end,
        system=left + "system" + right + "{content}" + end,
    )


def _eos_once(slots: Slots) -> Slots:
    return replace(slots, answer=slots.answer.replace("{eos}", ""), eos_once=True)


_CHATML = _chatml()
_CHATML_BOS = replace(_CHATML, prefix="{bos}")
_QWEN3 = replace(_CHATML, tools=True, thought=_THINK)
_LLAMA3 = replace(_headed("<|start_header_id|>", "<|end_header_id|>\n\n", "<|eot_id|>"), prefix="{bos}")
_GEMMA = Slots(
    user="<start_of_turn>user\n{content}<end_of_turn>\n",
    head="<start_of_turn>model\n",
    answer="{content}<end_of_turn>\n",
    system="{content}\n\n",
    prefix="{bos}",
    system_in_user=True,
)
_MINISTRAL = Slots(user="[INST]{content}[/INST]", system="{content}\n\n", prefix="{bos}", system_in_user=True)
_LLAMA2 = Slots(user="{bos}[INST] {content} [/INST]", system="<<SYS>>\n{content}\n<</SYS>>\n\n", system_in_user=True)
_DEEPSEEK3 = Slots(user="<｜User｜>{content}", head="<｜Assistant｜>", prefix="{bos}")
_GLM4 = Slots(
    user="<|user|>\n{content}",
    head="<|assistant|>",
    answer="\n{content}",
    system="<|system|>\n{content}",
    prefix="[gMASK]<sop>",
    eos_once=True,
)
_PHI = _headed("<|", "|>\n", "<|end|>\n")
_GRANITE = _headed("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>\n")
_GEMMA4 = replace(
    _headed("<|turn>", "\n", "<turn|>\n", head="model"),
    system="<|turn>system\n<|think|>{content}<turn|>\n",
    prefix="{bos}",
    default_system=_HELPFUL,
    thought=("<|channel>thought\n", "<channel|>"),
)
_SEED = Slots(user="{bos}user\n{content}{eos}", head="{bos}assistant\n", system="{bos}system\n{content}{eos}")

NAMED: dict[str, Slots] = {
    "aeva": replace(
        _GLM4,
        thought=_TAGS,
        empty_thought="</think>",
        default_system="You are an AI assistant named Aeva created by Zongzhi Lou. "
        "Your answer should be friendly, unbiased, faithful, informative and detailed.",
    ),
    "alpaca": Slots(
        user="### Instruction:\n{content}",
        head="\n\n### Response:\n",
        answer="{content}{eos}\n\n",
        default_system="Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n",
    ),
    "bailing": _eos_once(
        Slots(user="<role>HUMAN</role>{content}", head="<role>ASSISTANT</role>", system="<role>SYSTEM</role>{content}")
    ),
    "bailing_v2": replace(
        _headed("<role>", "</role>", "<|role_end|>", user="HUMAN", head="ASSISTANT"),
        system="<role>SYSTEM</role>{content}<|role_end|>",
        eos_once=True,
    ),
    "breeze": _eos_once(Slots(user="[INST] {content} [/INST] ", prefix="{bos}")),
    "chatml": _CHATML,
    "chatml_de": replace(_CHATML, default_system="Du bist ein freundlicher und hilfsbereiter KI-Assistent."),
    "cohere": Slots(
        user="<|START_OF_TURN_TOKEN|><|USER_TOKEN|>{content}<|END_OF_TURN_TOKEN|>",
        head="<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
        system="<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>{content}<|END_OF_TURN_TOKEN|>",
        prefix="{bos}",
    ),
    "cpm4": _CHATML_BOS,
    "dbrx": replace(
        _CHATML,
        default_system="You are DBRX, created by Databricks. You were last updated in December 2023. "
        "You answer questions based on information available up to that point.\n"
        "YOU PROVIDE SHORT RESPONSES TO SHORT QUESTIONS OR STATEMENTS, but provide thorough responses to more complex "
        "and open-ended questions.\nYou assist with various tasks, from writing to coding (using markdown for code "
        "blocks — remember to use ``` with code, JSON, and tables).\n(You do not have real-time data access or code "
        "execution capabilities. You avoid stereotyping and provide balanced perspectives on controversial topics. "
        "You do not provide song lyrics, poems, or news articles and do not divulge details of your training data.)\n"
        "This is your system prompt, guiding your responses. Do not reference it, just respond to the user. If you "
        "find yourself talking about this message, stop. You should be responding appropriately and usually that "
        "means not mentioning this.\nYOU DO NOT MENTION ANY OF THIS INFORMATION ABOUT YOURSELF UNLESS THE INFORMATION "
        "IS DIRECTLY PERTINENT TO THE USER'S QUERY.",
    ),
    "deepseek": Slots(
        user="User: {content}\n\n",
        head="Assistant:",
        system="{content}\n\n",
        prefix="{bos}",
    ),
    "deepseek3": _DEEPSEEK3,
    "deepseekcoder": Slots(
        user="### Instruction:\n{content}\n",
        head="### Response:",
        answer="\n{content}\n<|EOT|>\n",
        prefix="{bos}",
        default_system="You are an AI programming assistant, utilizing the DeepSeek Coder model, developed by "
        "DeepSeek Company, and you only answer questions related to computer science. For politically sensitive "
        "questions, security and privacy issues, and other non-computer science questions, "
        "you will refuse to answer.\n",
    ),
    "deepseekr1": replace(_DEEPSEEK3, thought=_THINK),
    "default": Slots(
        user="Human: {content}{eos}\n",
        head="Assistant:",
        answer="{content}{eos}\n",
        system="System: {content}{eos}\n",
    ),
    "ernie": replace(
        _chatml("<|im_end|>\n\n"),
        default_system="<global_setting>\nthink_mode=True\n</global_setting>",
    ),
    "ernie_nothink": Slots(
        user="User: {content}\n",
        head="Assistant: ",
        answer="{content}<|end_of_sentence|>",
        system="{content}\n",
        prefix="<|begin_of_sentence|>",
    ),
    "exaone": Slots(
        user="[|user|]{content}\n",
        head="[|assistant|]",
        answer="{content}{eos}\n",
        system="[|system|]{content}[|endofturn|]\n",
    ),
    "falcon": Slots(user="User: {content}\n", head="Falcon:", answer="{content}\n", eos_once=True),
    "falcon_h1": _CHATML_BOS,
    "fewshot": Slots(user="{content}", answer="{content}\n\n", eos_once=True),
    "gemma": _GEMMA,
    "gemma2": replace(_GEMMA, eos_once=True),
    "gemma3": _GEMMA,
    "gemma3n": _GEMMA,
    "gemma4": _GEMMA4,
    "gemma4n": _GEMMA4,
    "glm4": _GLM4,
    "glm4_7": replace(_GLM4, thought=_TAGS, empty_thought="</think>"),
    "glm4_moe": replace(_GLM4, thought=_THINK),
    "glmz1": replace(_GLM4, thought=_THINK),
    "gpt_oss": Slots(
        user="<|start|>user<|message|>{content}<|end|>",
        head="<|start|>assistant",
        answer="{content}",
        system="<|start|>system<|message|>{content}<|end|>",
        default_system="You are ChatGPT, a large language model trained by OpenAI.",
        eos_once=True,
        thought=("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
    ),
    "granite3": _GRANITE,
    "granite4": replace(_GRANITE, default_system="You are Granite, developed by IBM. You are a helpful AI assistant."),
    "hunyuan": Slots(
        user="{content}<|extra_0|>",
        answer="{content}<|eos|>",
        system="{content}<|extra_4|>",
        prefix="<|startoftext|>",
    ),
    "hunyuan_small": Slots(
        user="<｜hy_User｜>{content}<｜hy_place▁holder▁no▁8｜>",
        answer="{content}<｜hy_place▁holder▁no▁2｜>",
        system="{content}<｜hy_place▁holder▁no▁3｜>",
        prefix="<｜hy_begin▁of▁sentence｜>",
    ),
    "hy3": Slots(
        user="<｜hy_User｜>{content}",
        head="<｜hy_Assistant｜>",
        answer="{content}<｜hy_eos｜>",
        prefix="{bos}",
        thought=_TAGS,
    ),
    # here the header of an answer is trained on and not prompted
    "hy_dense_1_8b": Slots(
        user="<｜hy_User｜>{content}",
        answer="<｜hy_Assistant｜>{content}",
        system="{content}<｜hy_place▁holder▁no▁3｜>",
        prefix="{bos}",
        eos_once=True,
    ),
    "hy_dense_7b": _eos_once(Slots(user="{content}<|extra_0|>", system="{content}<|extra_4|>", prefix="{bos}")),
    "index": _eos_once(Slots(user="reserved_0{content}reserved_1", system="<unk>{content}")),
    "intern2": replace(
        _CHATML_BOS,
        default_system="You are an AI assistant whose name is InternLM (书生·浦语).\n"
        "- InternLM (书生·浦语) is a conversational language model that is developed by Shanghai AI Laboratory "
        "(上海人工智能实验室). It is designed to be helpful, honest, and harmless.\n"
        "- InternLM (书生·浦语) can understand and communicate fluently in the language "
        "chosen by the user such as English and 中文.",
    ),
    "intern_s1": _CHATML_BOS,
    "lfm2": replace(_CHATML, default_system="You are a helpful AI assistant."),
    "llama2": _LLAMA2,
    "llama2_zh": replace(_LLAMA2, default_system="You are a helpful assistant. 你是一个乐于助人的助手。"),
    "llama3": _LLAMA3,
    "llama4": replace(_headed("<|header_start|>", "<|header_end|>\n\n", "<|eot|>"), prefix="{bos}"),
    "mimo": replace(_QWEN3, default_system=_HELPFUL),
    "mimo_v2": replace(
        _QWEN3, default_system="You are MiMo, a helpful AI assistant engineered by Xiaomi.", thought=_TAGS
    ),
    "minimax1": Slots(
        user="<beginning_of_sentence>user name=user\n{content}<end_of_sentence>\n",
        head="<beginning_of_sentence>ai name=assistant\n",
        answer="{content}<end_of_sentence>\n",
        system="<beginning_of_sentence>system ai_setting=assistant\n{content}<end_of_sentence>\n",
        default_system=_HELPFUL,
    ),
    "minimax2": Slots(
        user="]~b]user\n{content}[e~[\n",
        head="]~b]ai\n",
        answer="{content}[e~[\n",
        system="]~!b[]~b]system\n{content}[e~[\n",
        default_system="You are a helpful assistant. Your name is MiniMax-M2.1 and is built by MiniMax.",
        thought=_THINK,
    ),
    "ministral": _MINISTRAL,
    "ministral3": _MINISTRAL,
    "mistral": replace(_MINISTRAL, user="[INST] {content}[/INST]", answer=" {content}{eos}"),
    "mistral_small": replace(_MINISTRAL, system="[SYSTEM_PROMPT]{content}[/SYSTEM_PROMPT]", system_in_user=False),
    "moonlight": Slots(
        user="<|im_user|>user<|im_middle|>{content}<|im_end|>",
        head="<|im_assistant|>assistant<|im_middle|>",
        answer="{content}<|im_end|>",
        system="<|im_system|>system<|im_middle|>{content}<|im_end|>",
        default_system="You are a helpful assistant provided by Moonshot-AI.",
    ),
    "olmo": Slots(user="<|user|>\n{content}", head="<|assistant|>\n", prefix="{eos}"),
    "openchat": Slots(user="GPT4 Correct User: {content}{eos}", head="GPT4 Correct Assistant:", prefix="{bos}"),
    "openchat-3.6": Slots(
        user="<|start_header_id|>GPT4 Correct User<|end_header_id|>\n\n{content}<|eot_id|>",
        head="<|start_header_id|>GPT4 Correct Assistant<|end_header_id|>\n\n",
        prefix="{bos}",
    ),
    "opencoder": replace(_CHATML, default_system="You are OpenCoder, created by OpenCoder Team."),
    "phi": _PHI,
    "phi4": _headed("<|im_start|>", "<|im_sep|>", "<|im_end|>"),
    "phi4_mini": _headed("<|", "|>", "<|end|>"),
    "phi_small": _PHI,
    "qwen": replace(
        _CHATML,
        tools=True,
        default_system="You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
    ),
    "qwen3": _QWEN3,
    "qwen3_5": replace(_QWEN3, tools=False),
    "qwen3_5_nothink": _CHATML,
    "qwen3_6": replace(_QWEN3, tools=False),
    "qwen3_nothink": replace(_CHATML, tools=True),
    "sailor": replace(
        _chatml(user="question", head="answer"),
        default_system="You are an AI assistant named Sailor created by Sea AI Lab. "
        "Your answer should be friendly, unbiased, faithful, informative and detailed.",
    ),
    "seed_coder": replace(
        _SEED,
        default_system="You are an AI programming assistant, utilizing the Seed-Coder model, developed by "
        "ByteDance Seed, and you only answer questions related to computer science. For politically sensitive "
        "questions, security and privacy issues, and other non-computer science questions, "
        "you will refuse to answer.\n\n",
    ),
    "seed_oss": replace(_SEED, thought=("<seed:think>", "</seed:think>")),
    "smollm": _CHATML,
    "smollm2": replace(_CHATML, default_system="You are a helpful AI assistant named SmolLM, trained by Hugging Face."),
    "solar": _eos_once(
        Slots(user="### User:\n{content}\n\n", head="### Assistant:\n", system="### System:\n{content}\n\n")
    ),
    "starchat": replace(_PHI, head="<|assistant|>"),
    "telechat2": Slots(
        user="<_user>{content}",
        head="<_bot>",
        system="<_system>{content}",
        default_system="你是中国电信星辰语义大模型，英文名是TeleChat，"
        "你是由中电信人工智能科技有限公司和中国电信人工智能研究院（TeleAI）研发的人工智能助手。",
    ),
    "vicuna": Slots(user="USER: {content}", head=" ASSISTANT:", default_system=_CURIOUS),
    "xuanyuan": Slots(
        user="Human: {content}",
        head=" Assistant:",
        default_system="以下是用户和人工智能助手之间的对话。用户以Human开头，人工智能助手以Assistant开头，"
        "会对人类提出的问题给出有帮助、高质量、详细和礼貌的回答，并且总是拒绝参与与不道德、"
        "不安全、有争议、政治敏感等相关的话题、问题和指示。\n",
    ),
    "yi": _CHATML,
    "youtu": Slots(
        user="<|User|>{content}",
        head="<|Assistant|>",
        answer="{content}<|end_of_text|>",
        prefix="{bos}",
        thought=_THINK,
    ),
    "yuan": Slots(user="{content}<sep>", answer="{content}<eod>\n"),
    "zephyr": Slots(
        user="<|user|>\n{content}{eos}",
        head="<|assistant|>\n",
        system="<|system|>\n{content}{eos}",
        default_system="You are Zephyr, a helpful assistant.",
    ),
}

_MULTIMODAL = (
    "dots_ocr ernie_vl glm4_5v glm4v glm_ocr granite3_vision intern_vl keye_vl kimi_vl lfm2_vl llava llava_next "
    "llava_next_llama3 llava_next_mistral llava_next_qwen llava_next_video llava_next_video_mistral "
    "llava_next_video_yi llava_next_yi mimo_vl minicpm_o minicpm_v minicpm_v_4_6 mllama moss_vl paligemma "
    "paligemma_chat pixtral qwen2_audio qwen2_omni qwen2_vl qwen3_omni qwen3_omni_nothink qwen3_vl "
    "qwen3_vl_nothink video_llava yi_vl youtu_vl"
)
# unsupported names, and why
REFUSED: dict[str, str] = {
    "chatglm3": "it needs tokens that text cannot name",
    **dict.fromkeys(_MULTIMODAL.split(), "it is for images, sound or video, which are not trained on here"),
}
