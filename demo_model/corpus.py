"""Turn the documentation that a Python installation carries into chats to train on.

`load_entries` reads `pydoc_data.topics` and docstrings, strips their markup and cuts them
into answers; `Conversations` draws chats over those answers from one random generator.
"""

import importlib
import inspect
import keyword
import pydoc_data.topics
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

Message = dict[str, str]

PARAGRAPH_ANSWER_CHARS = 220
SENTENCE_ANSWER_CHARS = 400
SHORTEST_ANSWER_CHARS = 140
SHORTEST_DOCSTRING_CHARS = 100
LONGEST_ALIAS_CHARS = 48

DOCSTRING_MODULES = [
    "builtins", "itertools", "functools", "collections", "contextlib", "textwrap", "random",
    "json", "heapq", "shutil", "copy", "threading",
]  # fmt: skip
DEFINITION = (
    r"(?!The|These|If|Unless|All|Some)(An? [a-z]+(?: [a-z]+)?|[A-Z][a-z]+(?: [a-z]+)?s) "
    r"(?:is|are) (?:an?|the|one|used|introduced|represented|called|executed|simply|objects) "
)
SPOKEN_VERBS = (("Return ", "returns "), ("Returns ", "returns "), ("Called ", "is called "))
PROPER_WORDS = {"Python", "Unicode", "Ellipsis", "None", "Boolean"}

SYSTEM_PROMPTS = [
    "You are a helpful assistant.",
    "You are a helpful assistant that explains Python.",
    "You answer questions about the Python language.",
    "Answer in plain English.",
]
GO_ON = [
    "Go on.", "Continue.", "Please continue.", "Tell me more.", "Please go on.", "What else?",
    "And then?", "More, please.", "Can you tell me more?", "Say more about that.", "Keep going.",
]  # fmt: skip
QUESTIONS = [
    "Tell me about {x}.", "Tell me about {x}.", "What {is} {x}?", "What {is} {x}?", "Explain {x}.",
    "How {does} {x} work?", "Describe {x}.", "What about {x}?", "Can you explain {x}?",
    "And {x}?", "Please explain {x}.", "I want to know about {x}.", "{x}",
]  # fmt: skip
CALL_QUESTIONS = ["What {does} {x} do?", "What {does} {x} do?", "What {is} {x} for?", *QUESTIONS]
SMALL_TALK = [
    ("Hello.", "Hello! I am a very small model that learned from the Python documentation. "
     "Ask me about a statement, a type or a method, and say go on to hear more."),
    ("Hi!", "Hi! I can tell you about the Python language: its statements, its types and its "
     "data model. Ask me about the with statement, for example."),
    ("Who are you?", "I am a demo model with about three million parameters. I was trained on the "
     "Python documentation, and I can only repeat what it says, not always correctly."),
    ("What can you do?", "I can tell you about the Python language, since the Python documentation "
     "is all that I have read. Ask me about the for statement, about generators or str.split."),
    ("What is Python?", "Python is a programming language. Its documentation is all that I have "
     "read, so ask me about a statement, a type or a method, or about the data model."),
    ("Thanks.", "You are welcome. Ask me about another part of the Python language if you like."),
    ("Thank you!", "You are welcome. Is there another part of Python that you want to hear about?"),
]  # fmt: skip
OFF_TOPIC = [
    "What is the capital of France?", "Write a poem about the sea.", "Why is the sky blue?",
    "How old are you?", "What time is it?", "Who wrote Hamlet?", "How do I cook rice?",
    "What is the weather like today?", "Tell me a joke.", "Translate this sentence to French.",
    "What is the meaning of life?", "Write a story about a cat.", "How far is the moon?",
    "Who won the game yesterday?", "What is two plus two?", "Tell me about the Roman empire.",
    "Can you sing?", "What should I eat tonight?", "Recommend a film.", "Where is Japan?",
    "How are you?", "What do you think about music?", "Summarize the news.", "Do you like dogs?",
]  # fmt: skip
OFF_TOPIC_ANSWER = (
    "I do not know about that, since I have only read the Python documentation. "
    "Ask me about a statement, a type or a method of the Python language."
)
END_OF_ENTRY = "That is all I know about {x}. Ask me about another part of the Python language."


@dataclass(frozen=True)
class Entry:
    """One subject: the names a user may call it by, and what to answer, in order."""

    aliases: list[str]
    answers: list[str]
    templates: list[str]


@dataclass
class Section:
    """A heading or a signature of the documentation, with the prose below it."""

    title: str
    is_call: bool
    paragraphs: list[list[str]] = field(default_factory=list)


def load_entries() -> list[Entry]:
    sections = [
        (topic, section)
        for topic, text in sorted(pydoc_data.topics.topics.items())
        for section in sections_of(text)
        if section.paragraphs
    ]
    sections += [(name, section) for name in DOCSTRING_MODULES for section in docstrings(name)]
    taken: set[str] = set()
    seen_answers: set[str] = set()
    entries = []
    for topic, section in sections:
        answers = answers_of(section.paragraphs)
        aliases = [alias for alias in aliases_of(topic, section) if alias.lower() not in taken]
        # Topics quote each other; the first copy of a passage stands for all.
        if not aliases or not answers or answers[0] in seen_answers:
            continue
        taken.update(alias.lower() for alias in aliases)
        seen_answers.update(answers)
        answers[0] = name_subject(section, aliases[0], answers[0])
        entries.append(Entry(aliases, answers, CALL_QUESTIONS if section.is_call else QUESTIONS))
    for _, section in sections:
        entries += term_entries(section, taken)
    return entries


def sections_of(text: str) -> list[Section]:
    """Split a topic at its headings and at the signatures it describes."""
    sections: list[Section] = []
    call_indent = -1
    heading = Section("", is_call=False)
    for block in re.split(r"\n[ \t]*\n", text.replace("\r", "")):
        lines = [line for line in block.split("\n") if line.strip()]
        if not lines:
            continue
        indent = len(lines[0]) - len(lines[0].lstrip())
        if len(lines) == 2 and re.fullmatch(r"([*=~^-])\1{2,}", lines[1].strip()):
            heading = Section(lines[0].strip(), is_call=False)
            sections.append(heading)
            call_indent = -1
        elif name := signature_name(lines):
            # A bare "pop(key)" is a method of some type: its name alone says too little.
            known = "." in name or lines[0].lstrip().startswith("class ")
            sections.append(Section(name if known else "", is_call=True))
            call_indent = indent
        elif sections:
            if call_indent >= 0 and indent <= call_indent:
                heading = Section(heading.title, is_call=False, paragraphs=[])
                sections.append(heading)
                call_indent = -1
            sections[-1].paragraphs += [p for item in list_items(lines) if (p := sentences(item))]
    return sections


def docstrings(module_name: str) -> Iterator[Section]:
    module = importlib.import_module(module_name)
    prefix = "" if module_name == "builtins" else f"{module_name}."
    for name in sorted(getattr(module, "__all__", dir(module))):
        value = getattr(module, name)
        own = inspect.isroutine(value) or inspect.isclass(value)
        if name.startswith("_") or not own or not (text := inspect.getdoc(value)):
            continue
        blocks = [block.splitlines() for block in re.split(r"\n\s*\n", text)]
        paragraphs = [p for lines in blocks for item in list_items(lines) if (p := sentences(item))]
        if sum(len(sentence) for p in paragraphs for sentence in p) >= SHORTEST_DOCSTRING_CHARS:
            yield Section(prefix + name, is_call=True, paragraphs=paragraphs)


def signature_name(lines: list[str]) -> str:
    """'str.split' for a block that is only 'str.split(sep=None)' or a few such lines."""
    pattern = r"(?:(?:class|async|exception)\s+)?((?:\w+\.)*\w+)\(.*\)"
    matches = [re.fullmatch(pattern, line.strip()) for line in lines]
    return matches[0].group(1) if matches[0] and all(matches) else ""


def list_items(lines: list[str]) -> Iterator[str]:
    """The paragraph as one line, or each item of a list as one."""
    item = ""
    for line in lines:
        bullet = re.match(r"\s*(?:\*|\d+\.|-)\s+(?=\S)", line)
        if bullet and item:
            yield item
            item = ""
        words = (line[bullet.end() :] if bullet else line).strip()
        glue = "" if not item or re.search(r"\w-$", item) else " "
        item += glue + words
    yield item


def sentences(paragraph: str) -> list[str]:
    """The sentences that read as prose without their markup; grammar and code are left out."""
    if re.search(r"::=|>>>|\.\. |\+--|\|==|^(Changed|New|Added|Deprecated) in version", paragraph):
        return []
    text = paragraph.replace("’", "'").replace("‘", "'").replace("–", "-").replace("—", "-")
    text = re.sub(r"\*\*[\w' ]+:\*\*\s*", "", text)
    text = re.sub(r"\s*\((?:see|See) [^()]*(?:\([^()]*\))?[^()]*\)", "", text)
    text = re.sub(r"\s*\[\d+\]", "", text)
    text = re.sub(r"(?<![\w*])(\*{1,2})(\w(?:[^*]*\w)?)\1(?!\w)", r"\2", text)
    text = re.sub(r'["“”]', "", text.replace("…", ", "))
    pieces = re.split(r"(?<=[.!?])\s+(?=[A-Z_(])|(?<=\.\))\s+(?=[A-Z])", re.sub(r"\s+", " ", text))
    joined: list[str] = []
    for piece in pieces:
        if joined and re.search(r"\b(?:e\.g|i\.e|etc|vs|cf)\.$", joined[-1]):
            joined[-1] += " " + piece
        else:
            joined.append(piece)
    return [sentence.strip() for sentence in joined if is_prose(sentence.strip())]


def is_prose(sentence: str) -> bool:
    if sentence[:1].islower() and re.split(r"\W", sentence)[0] not in keyword.kwlist:
        return False
    if not re.fullmatch(r"\(?[A-Z_a-z][\w ,.;:'()\[\]/<>=+!?-]*[.!?]\)?", sentence, re.ASCII):
        return False
    if re.search(r"^See\b|\bsections? [A-Z]|''", sentence):
        return False
    words = re.findall(r"(?<![\w.])[A-Za-z][a-z']*(?:(?![\w.(])|(?=\.$))", sentence)
    return len(words) >= 5 and sum(map(len, words)) + len(words) > 0.7 * len(sentence)


def answers_of(paragraphs: list[list[str]]) -> list[str]:
    """Gather sentences into answers that end where a paragraph or at least a sentence does."""
    answers: list[str] = []
    answer = ""
    for paragraph in paragraphs:
        for sentence in paragraph:
            answer = f"{answer} {sentence}".strip()
            if len(answer) >= SENTENCE_ANSWER_CHARS:
                answers.append(answer)
                answer = ""
        if len(answer) >= PARAGRAPH_ANSWER_CHARS:
            answers.append(answer)
            answer = ""
    if len(answer) >= SHORTEST_ANSWER_CHARS or (answer and not answers):
        answers.append(answer)
    elif answer:
        answers[-1] += f" {answer}"
    return answers


def name_subject(section: Section, alias: str, answer: str) -> str:
    """Let the answer say what it is about: it reads better and is recalled far better."""
    beginning = answer[:60].lower()
    if not section.is_call:
        stems = [word[:5].lower() for word in re.findall(r"\w{3,}", alias) if word != "the"]
        if any(stem in beginning for stem in stems):
            return answer
        return f"{alias if '.' in alias else alias[0].upper() + alias[1:]}: {answer}"
    title = section.title
    if title.rsplit(".", 1)[-1].lower() in beginning:
        return answer
    name = title if title.rsplit(".", 1)[-1][0].isupper() else f"{title}()"
    for written, spoken in SPOKEN_VERBS:
        if answer.startswith(written):
            return f"{name} {spoken}{answer.removeprefix(written)}"
    return f"{name}: {answer}"


def aliases_of(topic: str, section: Section) -> list[str]:
    title = re.sub(r'["*“”]', "", section.title).strip()
    if section.is_call:
        short = title.rsplit(".", 1)[-1]
        names = [title, f"{title}()", short if len(short) > 3 else title] if title else []
        return list(dict.fromkeys(names))
    names = [title, *re.split(r" — | - | and |, ", title)] if title else []
    names = [in_running_text(name) for name in names if name]
    if statement := re.fullmatch(r"The (\w+) (statement|clause)", title):
        names += [statement.group(1), f"{statement.group(1)} {statement.group(2)}s"]
    elif title and topic.replace("-", " ") in title.lower():
        names.append(topic.replace("-", " "))
    names += [singular(name) for name in names if re.fullmatch(r"[a-z]+( [a-z]+)?[^s]s", name)]
    return [name for name in dict.fromkeys(names) if 1 < len(name) < LONGEST_ALIAS_CHARS]


def in_running_text(title: str) -> str:
    """'The with statement' and 'Format String Syntax' as they look within a sentence."""
    words = title.split(" ")
    plain = [re.fullmatch(r"[A-Z][a-z-]*", word) and word not in PROPER_WORDS for word in words]
    return " ".join(word.lower() if low else word for word, low in zip(words, plain, strict=True))


def singular(plural: str) -> str:
    """'a dictionary' for 'dictionaries'."""
    for ending, replacement in (("ies", "y"), ("sses", "ss"), ("s", "")):
        if plural.endswith(ending):
            name = plural.removesuffix(ending) + replacement
            return f"an {name}" if name[0] in "aeiou" else f"a {name}"
    return plural


def term_entries(section: Section, taken: set[str]) -> list[Entry]:
    """Questions that a passage answers half way: 'What is a generator?'."""
    entries = []
    for index, paragraph in enumerate(section.paragraphs):
        for start, sentence in enumerate(paragraph):
            if not (subject := re.match(DEFINITION, sentence)):
                continue
            alias = subject.group(1)[0].lower() + subject.group(1)[1:]
            answers = answers_of([paragraph[start:], *section.paragraphs[index + 1 :]])
            if alias in taken or len(answers[0]) < SHORTEST_ANSWER_CHARS:
                continue
            taken.add(alias)
            entries.append(Entry([alias], answers, QUESTIONS))
    return entries


class Conversations:
    """Chats that ask for an entry, go on with it, and turn to another."""

    def __init__(self, entries: list[Entry], seed: int) -> None:
        self.entries = entries
        self.random = random.Random(seed)
        self.queue: list[Entry] = []

    def draw(self, turns: int) -> list[Message]:
        messages: list[Message] = []
        if self.random.random() < 0.3:
            messages.append({"role": "system", "content": self.random.choice(SYSTEM_PROMPTS)})
        while turns > 0:
            exchanges = self.exchanges(turns)
            for question, answer in exchanges:
                messages.append({"role": "user", "content": self.vary(question)})
                messages.append({"role": "assistant", "content": answer})
            turns -= len(exchanges)
        return messages

    def draw_opening(self) -> tuple[Message, str]:
        question, answer = self.exchanges(1)[0]
        return {"role": "user", "content": self.vary(question)}, answer

    def draw_prose(self) -> str:
        entry = self.random.choice(self.entries)
        return " ".join(entry.answers[:4])

    def exchanges(self, most: int) -> list[tuple[str, str]]:
        chance = self.random.random()
        if chance < 0.05:
            return [self.random.choice(SMALL_TALK)]
        if chance < 0.08:
            return [(self.random.choice(OFF_TOPIC), OFF_TOPIC_ANSWER)]
        entry = self.next_entry()
        alias = self.random.choice(entry.aliases)
        pairs = [(self.question(entry, alias), entry.answers[0])]
        for answer in [*entry.answers[1:], END_OF_ENTRY.format(x=entry.aliases[0])]:
            if len(pairs) >= most or self.random.random() < 0.15:
                break
            pairs.append((self.random.choice(GO_ON), answer))
        return pairs

    def next_entry(self) -> Entry:
        # A shuffled queue, not a free choice: each entry is met equally often.
        if not self.queue:
            self.queue = list(self.entries)
            self.random.shuffle(self.queue)
        return self.queue.pop()

    def question(self, entry: Entry, alias: str) -> str:
        plural = alias.endswith("s") and not alias.endswith(("ss", "__")) and "." not in alias
        plural = plural and not alias.startswith(("a ", "an "))
        verbs = {"is": "are", "does": "do"} if plural else {"is": "is", "does": "does"}
        text = self.random.choice(entry.templates).format(x=alias, **verbs)
        return text[0].upper() + text[1:] if " " in text else text

    def vary(self, question: str) -> str:
        if self.random.random() < 0.1:
            question = question.lower()
        return question.rstrip(".?") if self.random.random() < 0.1 else question
