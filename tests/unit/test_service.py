"""What a frontend does on which thread, with the parts that text alone needs."""

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from tiny_tokenizer import build, card

from mmprep.digest import Hasher
from mmprep.errors import DeadlineExceeded, InvalidRequest
from mmprep.metrics import Metrics
from mmprep_frontend.media.allowance import MediaLimits
from mmprep_frontend.media.intake import Intake
from mmprep_frontend.model import load_model
from mmprep_frontend.render.loaded_tokenizer import load_tokenizer
from mmprep_frontend.render_thread import RenderThread
from mmprep_frontend.service import Service
from mmprep_frontend.texts import Texts

FEW, MANY = 100, 20_000


class Counting(ThreadPoolExecutor):
    """Counts what it is given."""

    def __init__(self):
        super().__init__(1)
        self.given = 0

    def submit(self, *work, **more):
        self.given += 1
        return super().submit(*work, **more)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return build(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(directory):
    loaded = load_tokenizer(directory)
    return load_model(directory, card(directory), loaded, name="tiny", max_model_len=50_000, template=None)


@pytest.fixture
def service(model):
    rendered, threads = Counting(), Counting()
    limits = MediaLimits(1, 1, 1, 1)
    made = Service(
        writer=None,
        intake=Intake(None, Hasher("blake3"), limits, threads, lambda _seconds: None),
        hasher=Hasher("blake3"),
        metrics=Metrics(),
        render_thread=RenderThread(rendered),
        threads=threads,
        tensor_dtype="auto",
        limits={},
        request_timeout=60.0,
        trusts_kwargs=False,
        trusts_templates=False,
    )
    made.model, made.rendered = model, rendered
    model.prompts.clear()
    yield made
    rendered.shutdown()
    threads.shutdown()


def body(**fields):
    return json.dumps(fields).encode()


def ask(call):
    return json.loads(asyncio.run(call))


@pytest.mark.parametrize(("length", "on_a_thread"), [(FEW, False), (MANY, True)])
def test_answers_of_many_ids_are_encoded_off_the_loop(service, model, length, on_a_thread):
    ids = [n % 256 for n in range(length)]
    text = model.tokenizer.decode(ids)
    assert ask(Texts(service).detokenize(body(tokens=ids))) == {"prompt": text}
    assert (service.threads.given > 0) == on_a_thread
    given = service.threads.given
    counted = ask(Texts(service).tokenize(body(prompt=text, return_token_strs=True)))
    assert counted["count"] == len(counted["tokens"]) == len(counted["token_strs"])
    assert model.tokenizer.decode(counted["tokens"]) == text
    assert (service.threads.given > given) == on_a_thread
    given = service.threads.given
    (answer,) = ask(Texts(service).completions(body(prompt=[ids]), "cmpl-1"))
    assert (answer["token_ids"], answer["request_id"]) == (ids, "cmpl-1-0")
    assert (service.threads.given > given) == on_a_thread


def test_ids_are_checked_on_the_render_thread(service, model):
    with pytest.raises(InvalidRequest) as refused:
        ask(Texts(service).detokenize(body(tokens=[1] * MANY + [model.tokenizer.vocab_size])))
    assert refused.value.param == f"tokens[{MANY}]"
    assert service.rendered.given == 1


@pytest.mark.parametrize(("words", "on_the_thread"), [(50, False), (2000, True)])
def test_short_texts_and_chats_are_tokenized_without_a_hop(service, model, words, on_the_thread):
    text = "cats " * words
    plain = ask(Texts(service).tokenize(body(prompt=text)))
    chat = body(messages=[{"role": "user", "content": text}])
    counted = ask(Texts(service).tokenize(chat))
    assert model.tokenizer.decode(plain["tokens"]) == text
    assert text in model.tokenizer.decode(counted["tokens"])
    assert ask(Texts(service).tokenize(chat)) == counted
    # The chat of before is remembered.
    assert service.rendered.given == 2 * on_the_thread


def test_many_prompts_are_not_short_because_each_is(service):
    answers = ask(Texts(service).completions(body(prompt=["a"] * 100), "cmpl-1"))
    assert [answer["token_ids"] for answer in answers] == [answers[0]["token_ids"]] * 100
    assert service.rendered.given == 1


def test_a_short_chat_whose_template_does_much_goes_to_the_thread(service, directory):
    template = "{% for n in range(10000) %}{% endfor %}{{ messages[0].content }}"
    loaded = load_tokenizer(directory)
    service.model = load_model(directory, card(directory), loaded, name="slow", max_model_len=100, template=template)
    counted = ask(Texts(service).tokenize(body(messages=[{"role": "user", "content": "cats"}])))
    assert service.model.tokenizer.decode(counted["tokens"]) == "cats"
    assert service.rendered.given == 1


def test_what_comes_too_late_is_not_begun(service):
    async def main():
        with pytest.raises(DeadlineExceeded):
            await service.at_once(asyncio.get_running_loop().time(), pytest.fail)

    asyncio.run(main())
