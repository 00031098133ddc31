"""The cache of encoded prompts."""

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from mmprep_frontend.render.conversation import Conversation
from mmprep_frontend.render.prompt_cache import PromptCache
from mmprep_frontend.render.requests import parse
from mmprep_frontend.render.tokens import EncodedPrompt

HELLO = Conversation([{"role": "user", "content": "Hello"}], [], 0)


def request(**fields):
    import msgspec

    body = {"messages": [{"role": "user", "content": "Hello"}], **fields}
    return parse(msgspec.json.encode(body), "chat", templates=True)


def key(cache, conversation=HELLO, *, nbytes=100, special=False, scope=b"", **fields):
    return cache.key(conversation, request(**fields), nbytes=nbytes, special=special, scope=scope)


def encoded(length, text=""):
    return EncodedPrompt([1] * length, [], text)


#: Room for 20 tokens in one prompt.
ROOM = PromptCache.size(encoded(20))


def test_equal_conversations_have_one_key_whatever_is_sampled():
    cache = PromptCache(ROOM)
    assert key(cache) == key(cache, temperature=0.5, max_tokens=7, mm_payload="none")
    assert key(cache, truncate_prompt_tokens=5) == key(cache, truncate_prompt_tokens=-1)


def test_everything_that_the_template_is_given_is_part_of_the_key():
    cache = PromptCache(ROOM)
    others = [
        key(cache, Conversation([{"role": "user", "content": "Hallo"}], [], 0)),
        key(cache, tools=[{"type": "function", "function": {"name": "look"}}]),
        key(cache, documents=[{"text": "x"}]),
        key(cache, chat_template_kwargs={"enable_thinking": False}),
        key(cache, reasoning_effort="low"),
        key(cache, add_generation_prompt=False),
        key(cache, add_generation_prompt=False, continue_final_message=True),
        key(cache, chat_template="own"),
        key(cache, truncate_prompt_tokens=5),
        key(cache, truncate_prompt_tokens=5, truncation_side="left"),
        key(cache, special=True),
        key(cache, scope=b"tenant"),
    ]
    assert len({key(cache), *others}) == len(others) + 1


def test_a_cache_of_no_size_keeps_nothing_and_finds_nothing():
    cache = PromptCache(0)
    assert key(cache) is None
    cache.put(None, encoded(3))
    assert cache.get(None) is None


def test_a_huge_conversation_has_no_key():
    assert key(PromptCache(ROOM), nbytes=64 * 1024) is not None
    assert key(PromptCache(ROOM), nbytes=64 * 1024 + 1) is None


def test_a_key_is_small_whatever_it_identifies():
    cache = PromptCache(ROOM)
    assert {len(key(cache)), len(key(cache, Conversation([{"role": "user", "content": "x" * 60_000}], [], 0)))} == {32}


def test_a_conversation_that_cannot_be_encoded_has_no_key():
    deep = {}
    for _ in range(10_000):
        deep = {"a": deep}
    assert key(PromptCache(ROOM), Conversation([{"role": "user", "content": "x", "tool_calls": deep}], [], 0)) is None


def test_the_text_of_prompts_and_an_overhead_count():
    cache = PromptCache(1 << 20)
    for number in range(10_000):
        cache.put(number.to_bytes(32, "big"), encoded(1))
    assert sum(cache.get(number.to_bytes(32, "big")) is not None for number in range(10_000)) <= (1 << 20) // 500
    cache.put(b"long", encoded(1, "x" * (1 << 20)))
    assert cache.get(b"long") is None
    cache.put(b"half", encoded(1, "x" * (1 << 19)))
    cache.put(b"other half", encoded(1, "x" * (1 << 19)))
    assert (cache.get(b"half"), cache.get(b"other half") is None) == (None, False)
    cache.validate()


class PromptCacheMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.cache = PromptCache(ROOM)
        self.recent = []

    @rule(key=st.binary(min_size=1, max_size=1), length=st.integers(1, 25))
    def put(self, key, length):
        known = self.cache.get(key)
        prompt = encoded(length)
        self.cache.put(key, prompt)
        if known is not None:
            assert self.cache.get(key) is known
        else:
            assert (self.cache.get(key) is prompt) == (length <= 20)
        if self.cache.get(key) is not None:
            self.recent = [key]

    @rule(key=st.binary(min_size=1, max_size=1))
    def get(self, key):
        if self.cache.get(key) is not None:
            self.recent = [key]

    @invariant()
    def holds(self):
        self.cache.validate()
        assert all(self.cache.get(key) is not None for key in self.recent), "what was used last was dropped"


TestPromptCacheMachine = PromptCacheMachine.TestCase
