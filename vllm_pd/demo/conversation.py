"""How people ask, and what the demo model says about itself."""

from __future__ import annotations

import re

WHAT_IT_IS = (
    "vllm-pd is disaggregated prefill-decode serving for unmodified vLLM. Prefill instances "
    "compute the KV cache of the prompt, decode instances generate the answer, and a router "
    "with the OpenAI API sends every request to both."
)
OPENING = (
    "Disaggregated prefill-decode serving runs the two phases of a request on different instances "
    "of vLLM. Prefill instances compute the KV cache of the prompt, decode instances generate the "
    "answer, and vllm-pd moves the KV cache from one to the other."
)
"""How a completion of the project's subject begins."""
WHO_IT_IS = (
    "I am the demo model of vllm-pd: a very small language model, trained on the documentation "
    "of vllm-pd and on nothing else. Ask me what vllm-pd is, how to start it, or what a "
    "setting means."
)
OFF_TOPIC = (
    "I do not know. I am the demo model of vllm-pd, very small, and I have read only its "
    "documentation. To serve a real model, start vllm-pd with MODEL set to its name or folder."
)

SMALL_TALK: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("hello", "Hello!", "hi", "Hi there", "hey", "Good morning", "Hello, how are you?"),
        f"Hello! {WHO_IT_IS}",
    ),
    (
        (
            "Who are you?",
            "who are you",
            "What are you?",
            "What is your name?",
            "Introduce yourself.",
            "What can you do?",
            "help",
            "What model are you?",
        ),
        WHO_IT_IS,
    ),
    (
        (
            "What is vllm-pd?",
            "what is vllm-pd",
            "What is vllm_pd?",
            "What is this?",
            "What is this project?",
            "Tell me about vllm-pd.",
            "Explain vllm-pd in one sentence.",
            "What does vllm-pd do?",
            "What is disaggregated serving?",
            "What is disaggregated prefill-decode serving?",
            "What is PD disaggregation?",
            "vllm-pd",
        ),
        WHAT_IT_IS,
    ),
    (
        ("Thanks", "Thank you!", "thank you very much", "Great, thanks."),
        "You are welcome. Ask me about anything else in the documentation of vllm-pd.",
    ),
    (("bye", "Goodbye", "See you"), "Goodbye, and thank you for trying vllm-pd."),
    (
        (
            "What is the capital of France?",
            "Write a poem about the sea.",
            "Tell me a joke.",
            "What is 2 + 2?",
            "Write a Python function that sorts a list.",
            "Who is the president?",
            "Tell me a story.",
            "Translate this into German.",
            "What is the weather like?",
            "Count from one to ten.",
            "Say something.",
            "Why is the sky blue?",
        ),
        OFF_TOPIC,
    ),
)

GLOSSARY: tuple[tuple[str, str], ...] = (
    (
        "prefill",
        "Prefill is the first phase of a request: the model reads the whole prompt at once and "
        "computes its KV cache. It is bound by compute.",
    ),
    (
        "decode",
        "Decode is the second phase of a request: the model generates the answer one token at a "
        "time from the KV cache. It is bound by memory bandwidth.",
    ),
    (
        "the KV cache",
        "The KV cache holds the keys and values of all tokens seen so far, in blocks. Prefill "
        "computes it for the prompt, and vllm-pd moves it to the decode instance.",
    ),
    (
        "a prefill instance",
        "A prefill instance is a vLLM server that computes the KV cache of prompts and hands it "
        "to a decode instance.",
    ),
    (
        "a decode instance",
        "A decode instance is a vLLM server that fetches the KV cache of a prompt from a prefill "
        "instance and generates the answer.",
    ),
    (
        "the router",
        "The router speaks the OpenAI API. It sends every request to a prefill instance first "
        "and then to a decode instance, and streams the answer to the client.",
    ),
    (
        "the KV connector",
        "The KV connector is the part of vllm-pd that runs inside vLLM. Its scheduler half "
        "decides what to load, its worker half moves the blocks.",
    ),
    (
        "TTFT",
        "TTFT is the time to first token: how long a client waits until the answer begins.",
    ),
    (
        "TPOT",
        "TPOT is the time per output token: the mean time between two tokens after the first.",
    ),
    (
        "a lease",
        "A lease is the time for which the blocks of a finished prefill wait for their consumer. "
        "When it expires, the blocks are freed and the decode instance computes the prompt.",
    ),
)

UNKNOWN_TOPICS = (
    *("a banana", "a cat", "an elephant", "the moon", "Paris", "Germany", "photosynthesis", "love"),
    *("the meaning of life", "gravity", "a black hole", "Shakespeare", "football", "chess", "tea"),
    *("a bicycle", "the stock market", "Bitcoin", "Linux", "JavaScript", "a recursive function"),
    *("quantum mechanics", "the Roman Empire", "music", "a good recipe", "bread", "a guitar"),
    *(
        "the ocean",
        "a volcano",
        "history",
        "mathematics",
        "pi",
        "a prime number",
        "my dog",
        "Tokyo",
    ),
    *("climate", "coffee", "a poem", "philosophy", "the theory of relativity", "DNA", "a car"),
)
"""Asked about in the same words as the documentation's topics; the answer is ``OFF_TOPIC``."""

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a helpful assistant that answers briefly.",
    "You answer questions about vllm-pd.",
    "Be concise.",
)

_PHRASINGS = (
    "What is {}?",
    "what is {}",
    "Tell me about {}.",
    "tell me about {}",
    "Explain {}.",
    "What does {} do?",
    "What does {} mean?",
    "How does {} work?",
    "How do I use {}?",
    "Describe {}",
    "Can you explain {}?",
    "Please explain {} to me.",
    "{}?",
    "{}",
)
_TASK_PHRASINGS = (
    "How do I {}?",
    "how do I {}",
    "How can I {}?",
    "Show me how to {}.",
    "I want to {}.",
)
_TASK = re.compile(
    r"(?:how to |to )?(add|benchmark|build|call|change|check|choose|configure|connect|contribute"
    r"|debug|deploy|develop|install|make|measure|monitor|read|remove|run|scale|send|serve|set up"
    r"|start|stop|test|try|upgrade|use|write)(?:ing)?\b(.*)",
    re.IGNORECASE,
)


def phrasings(topic: str) -> tuple[str, ...]:
    """Return ways to ask about a topic.

    A topic is a thing, a setting, a task like "Stop the service", or already a question.
    """
    if topic.endswith("?"):
        return (topic, topic.removesuffix("?"))
    asked = tuple(pattern.format(topic) for pattern in _PHRASINGS)
    if match := _TASK.fullmatch(topic):
        task = match[1].lower() + match[2]
        return asked + tuple(pattern.format(task) for pattern in _TASK_PHRASINGS)
    if topic[:1].isupper() and topic[1:2].islower():
        lowered = topic[0].lower() + topic[1:]
        return asked + tuple(pattern.format(lowered) for pattern in _PHRASINGS)
    return asked
