"""What a frontend does on which thread, with the parts that text alone needs."""

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from tiny_tokenizer import build, card

from mmprep.digest import Hasher
from mmprep.errors import InvalidRequest
from mmprep.metrics import Metrics
from mmprep_frontend.model import load_model
from mmprep_frontend.render.loaded_tokenizer import load_tokenizer
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
def model(tmp_path_factory):
    directory = build(tmp_path_factory.mktemp("model"))
    loaded = load_tokenizer(directory)
    return load_model(directory, card(directory), loaded, name="tiny", max_model_len=50_000, template=None)


@pytest.fixture
def service(model):
    render_thread, threads = Counting(), Counting()
    made = Service(
        writer=None,
        intake=None,
        hasher=Hasher("blake3"),
        metrics=Metrics(),
        render_thread=render_thread,
        threads=threads,
        tensor_dtype="auto",
        limits={},
        request_timeout=60.0,
        trusts_kwargs=False,
        trusts_templates=False,
    )
    made.model = model
    yield made
    render_thread.shutdown()
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
    assert service._render_thread.given == 1
