"""One suite a form: what every method must do, tested before its author writes a line.

A row of the catalogue that has an `entry` is a case of the suite of its form; so is a row that another package brings.
Nothing is to be registered here. `pytest tests/common -k KEY` runs all that concerns one method.

    suite.py            cases, rules, suites, and `CommonCase`: the little that a method may have to tell
    <form>.py           the rules of the form: read its docstrings to know what is checked
    test_<form>.py      runs them over every method of the form
    arguments.py        values to try for constructor arguments, found by introspection
    models.py           stock models and pipelines to put methods on: the zoo, and tiny ones of other architectures
    traces.py           all that a method could leave behind on a model or a pipeline
    journey.py          one fresh process and one Hub for all: loaded with this package, and without it
    planted/            methods made for the purpose, right ones and broken ones
    test_the_suites.py  every rule passes on the right ones and catches the broken one that was made for it
    test_upstream_suites.py  diffusers' own suites over our classes, from a checkout that `DIFFUSERS_CHECKOUT` names

What a suite cannot find by introspection, a method says in its own `tests/methods/test_<key>.py`:

    from tests.common.suite import CommonCase

    COMMON = CommonCase(settings=[{"schedule": "quad", "center": 3}])

Nothing here is imported by this file: the process that must do without this package imports `tests.common` too.
"""
