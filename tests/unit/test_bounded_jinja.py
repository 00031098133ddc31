"""Templates that would never end, or fill the memory, are stopped; all others render as in transformers' environment."""

import tracemalloc

import jinja2
import pytest
from transformers.utils.chat_template_utils import _compile_jinja_template

from mmprep import embedded
from mmprep_frontend.render.bounded_jinja import BoundedEnvironment, OverBudgetError, RaisedByTemplateError
from mmprep_frontend.render.template import load_sources

MESSAGES = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What? " * 3}]},
    {
        "role": "assistant",
        "content": "A cat.",
        "tool_calls": [{"function": {"name": "f", "arguments": {"a": [1, None]}}}],
    },
    {"role": "tool", "content": "é <b>"},
]
VARIABLES = {
    "messages": MESSAGES,
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "add_generation_prompt": True,
}


def rendered(source, environment=None, **variables):
    environment = environment or BoundedEnvironment()
    return environment.rendered(environment.compiled(source), {**VARIABLES, **variables})


ENDLESS = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "nested loops that print": "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
    "loops with conditions": (
        "{% for a in range(99999) if a %}{% for b in range(99999) if b %}{% for c in range(99) %}{% endfor %}"
        "{% endfor %}{% endfor %}"
    ),
    "a macro that calls itself twice": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "a recursive loop": (
        "{% for a in [1, 1] recursive %}{% if loop.depth < 60 %}{{ loop([1, 1]) }}{% endif %}{% endfor %}"
    ),
    "a caller that calls twice": (
        "{% macro f(n) %}{{ caller(n) }}{{ caller(n) }}{% endmacro %}"
        "{% macro g(n) %}{% if n %}{% call(m) f(n) %}{{ g(m - 1) }}{% endcall %}{% endif %}{% endmacro %}{{ g(50) }}"
    ),
    "filters over generators": "{% for a in range(99999) %}{{ range(99999) | map('string') | join }}{% endfor %}",
    "slow steps": (
        "{% set x = 'ab' * 5000000 %}{% for a in range(99999) %}{% for b in range(99) %}{% if 'c' in x[1:] %}{% endif %}"
        "{% endfor %}{% endfor %}"
    ),
}
DOUBLED = "{{% set ns = namespace(x={start}) %}}{{% for i in range(60) %}}{{% set ns.x = {step} %}}{{% endfor %}}{{{{ ns.x }}}}"
HUGE = {
    "a repeated text": "{{ 'x' * 10 ** 9 }}",
    "a repeated text, the other way": "{{ 10 ** 9 * 'x' }}",
    "a repeated list": "{{ ([1] * 10 ** 9) | length }}",
    "a list of one long text": "{% set x = 'x' * 10 ** 6 %}{{ [x] * 100 }}",
    "a power": "{{ 10 ** (10 ** 10) }}",
    "a product": DOUBLED.format(start="3", step="ns.x * ns.x"),
    "a doubled text": DOUBLED.format(start="'x'", step="ns.x ~ ns.x"),
    "a doubled sum": DOUBLED.format(start="'x'", step="ns.x + ns.x"),
    "a doubled list": DOUBLED.format(start="[1]", step="ns.x + ns.x"),
    "lists in lists": DOUBLED.format(start="[1]", step="[ns.x, ns.x]"),
    "tuples in tuples": DOUBLED.format(start="(1,)", step="(ns.x, ns.x)"),
    "mappings in mappings": DOUBLED.format(start="{}", step="{'a': ns.x, 'b': ns.x}"),
    "mappings by name": DOUBLED.format(start="{}", step="dict(a=ns.x, b=ns.x)"),
    "lists by filters": DOUBLED.format(start="[1]", step="[ns.x, ns.x] | map('list') | list"),
    "batches": DOUBLED.format(start="[1]", step="(ns.x + ns.x) | batch(2) | list"),
    "a replaced text": DOUBLED.format(start="'aa'", step="ns.x | replace('a', 'aa')"),
    "a replaced text by method": DOUBLED.format(start="'aa'", step="ns.x.replace('a', 'aa')"),
    "a replaced nothing": DOUBLED.format(start="'aa'", step="ns.x.replace('', ns.x)"),
    "a joined text": DOUBLED.format(start="'aa'", step="ns.x.join(ns.x)"),
    "a joined text by filter": DOUBLED.format(start="'aa'", step="ns.x | join(ns.x)"),
    "a joined generator": "{% set x = 'x' * 10 ** 6 %}{{ ','.join([x] | map('string')) ~ [x] | map('upper') | join(x * 16) }}",
    "a captured block": (
        "{% set ns = namespace(x='x') %}{% for i in range(60) %}{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}"
        "{% set ns.x = y %}{% endfor %}{{ ns.x }}"
    ),
    "a translated text": "{{ ('a' * 9999).translate({97: 'b' * 9999}) }}",
    "a centred text": "{{ 'x' | center(10 ** 9) }}",
    "a centred text by method": "{{ 'x'.center(10 ** 9) }}",
    "a justified text": "{{ 'x'.ljust(10 ** 9) }}{{ 'x'.rjust(10 ** 9) }}",
    "zeros": "{{ 'x'.zfill(10 ** 9) }}",
    "tabs": "{{ ('\t' * 1000).expandtabs(10 ** 6) }}",
    "tabs by name": "{{ ('\t' * 1000).expandtabs(tabsize=10 ** 6) }}",
    "bytes": "{{ (1).to_bytes(10 ** 9, 'big') }}",
    "bytes by name": "{{ (1).to_bytes(length=10 ** 9, byteorder='big') }}",
    "an indented text": "{{ ('\n' * 9999) | indent(9999, true, true) }}",
    "an indented text by name": "{{ ('\n' * 9999) | indent(width=9999, blank=true) }}",
    "an indented text by text": "{{ ('\n' * 9999) | indent('x' * 9999, blank=true) }}",
    "a wrapped text": "{{ ('a ' * 9999) | wordwrap(1, true, 'x' * 9999) }}",
    "a batch": "{{ [1] | batch(10 ** 9, 0) | list }}",
    "a slice": "{{ [1] | slice(10 ** 9) | list }}",
    "a rounded number": "{{ 1.5 | round(10 ** 9) }}",
    "an indented JSON": "{{ messages | tojson(indent=10 ** 9) }}",
    "a separated JSON": "{{ messages | tojson(separators=('x' * 10 ** 6, 'y')) }}",
    "a formatted number": "{{ '%999999999d' % 1 }}",
    "a formatted number of a width given": "{{ '%*d' % (999999999, 1) }}",
    "a formatted number by filter": "{{ '%999999999d' | format(1) }}",
    "a formatted number by method": "{{ '{:999999999}'.format(1) }}",
    "a formatted number of a width given, by method": "{{ '{:{}}'.format(1, 999999999) }}",
    "a formatted mapping": "{{ '{a:999999999}'.format_map({'a': 1}) }}",
    "a sum of lists": "{{ ([[1] * 1000] * 1000) | sum(start=[]) }}",
    "a long output": "{% set x = 'x' * 10 ** 6 %}{% for i in range(99) %}{{ x }}{% endfor %}",
    "lorem ipsum": "{{ lipsum(n=10 ** 6) }}",
}


@pytest.mark.parametrize("source", ENDLESS.values(), ids=list(ENDLESS))
def test_what_would_not_end_is_stopped(source):
    with pytest.raises(OverBudgetError):
        rendered(source, BoundedEnvironment(budget=300_000, seconds=0.3))


def test_the_limits_that_are_set_end_a_loop_too():
    with pytest.raises(OverBudgetError):
        rendered(ENDLESS["nested loops"])


@pytest.mark.parametrize("source", HUGE.values(), ids=list(HUGE))
def test_what_would_fill_the_memory_is_not_made(source):
    with pytest.raises((OverBudgetError, jinja2.UndefinedError)):
        rendered(source, BoundedEnvironment(largest=1 << 20))


SMALL = [
    "{{ 'x' * 3 }}{{ 2 * 'x' }}{{ [1] * 2 }}{{ 2 ** 10 }}{{ 7 * 6 }}{{ 2 ** -1 }}{{ 'a' ~ 1 ~ none ~ [1] }}",
    "{{ 'x' | center(5) }}|{{ 'x'.ljust(3) }}|{{ '7'.zfill(3) }}|{{ 'a\tb'.expandtabs(4) }}|{{ 'a,b'.replace(',', ';') }}",
    "{{ ['a', 'b'] | join(', ') }}{{ '-'.join(['a', 'b']) }}{{ 'aXa' | replace('a', 'b') }}{{ ['a'] | map('upper') | join }}",
    "{{ 'a\nb' | indent(2) }}{{ 'a b c' | wordwrap(2) }}{{ [1, 2, 3] | batch(2, 0) | list }}{{ 1.257 | round(2) }}",
    "{{ messages | tojson }}{{ messages | tojson(indent=2) }}{{ {'b': 1, 'a': 2} | tojson(sort_keys=true) }}",
    "{{ '%05.1f|%s' % (3.14159, 'x') }}{{ '{:>5}|{a}'.format('x', a=1) }}{{ '%s!' | format('x') }}{{ '{a}'.format_map({'a': 1}) }}",
    "{{ [1, 2] + [3] }}{{ (1, 2) + (3,) }}{{ 'a' + 'b' }}{{ [1, 2, 3] | sum }}{{ [{'n': 1}] | sum(attribute='n') }}",
    "{% macro f(a, b='x') %}{{ a ~ b }}{% endmacro %}{{ f('1') }}{% for x in [1, 2] if x > 1 %}{{ loop.index }}{% else %}n{% endfor %}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "{% for k, v in {'a': 1}.items() %}{{ k }}{{ v }}{% endfor %}{% set a, b = 1, [2] %}{{ a }}{{ b }}{{ messages[1:] | length }}",
    "{% for m in messages %}{% if loop.index == 2 %}{% break %}{% endif %}{{ m.role }}{% endfor %}{% generation %}g{% endgeneration %}",
    "{% filter upper %}a{% endfilter %}",
    "{{ strftime_now('%%') }}{{ messages | selectattr('role', 'equalto', 'tool') | list | length }}{{ dict(a=1)['a'] }}",
]


@pytest.mark.parametrize("source", [*SMALL, *load_sources(embedded.path()).values()])
def test_everything_else_renders_as_in_the_reference(source):
    assert rendered(source) == _compile_jinja_template(source).render(VARIABLES)


def test_each_rendering_has_a_budget_of_its_own_and_the_outcome_is_the_same_each_time():
    environment = BoundedEnvironment(budget=10_000)
    loop = environment.compiled("{% for a in range(n) %}{% endfor %}done")
    for _ in range(3):
        assert environment.rendered(loop, {"n": 9_000}) == "done"
        with pytest.raises(OverBudgetError):
            environment.rendered(loop, {"n": 11_000})


def test_what_a_template_makes_of_constants_is_not_made_when_it_is_compiled():
    environment = BoundedEnvironment()
    tracemalloc.start()
    try:
        compiled = environment.compiled("{{ 'x' | center(90000) }}" * 500)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 90_000 * 250
    with pytest.raises(OverBudgetError):
        environment.rendered(compiled, {})


def test_the_sandbox_stays_shut():
    for source in (
        "{{ messages.__class__.__mro__[1] }}",
        "{{ ''.format.__globals__ }}{{ nothing.more }}",
        "{{ '{0.__class__.__mro__}'.format(1).x.y }}",
        "{{ messages.append(1) }}",
        "{% set ns = namespace(_x=1) %}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    ):
        with pytest.raises(jinja2.TemplateError):
            rendered(source)


def test_a_template_can_refuse():
    with pytest.raises(RaisedByTemplateError, match="no"):
        rendered("{{ raise_exception('no') }}")
