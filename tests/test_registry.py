"""The catalogue, the public names, and registration with diffusers."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

import diffusers_ext as dx
from diffusers_ext import proofs, registry
from tests.fresh import run_fresh


def test_the_catalogue_has_all_papers():
    rows = dx.methods()
    ours = [row for row in rows if (row.module or "diffusers_ext").startswith("diffusers_ext")]
    assert len(ours) >= 289 and len({row.key for row in rows}) == len(rows)
    assert len(registry.areas()) == 17
    for row in ours:
        assert re.fullmatch(r"[a-z0-9_]+", row.key), row.key
        assert row.arxiv is None or re.fullmatch(r"\d{4}\.\d{4,5}", row.arxiv), row.key
        assert 10 <= len(row.summary.split()) <= 80, row.key
        assert bool(row.reason) == (row.form == "none"), row.key
        assert bool(row.entry) or row.form != "upstream", row.key


@pytest.mark.parametrize("row", [row for row in dx.methods() if row.entry], ids=lambda row: row.key)
def test_every_entry_resolves(row):
    for name in row.entry:
        assert registry.load_entry(name) is not None


def test_status_is_computed():
    assert {row.status for row in dx.methods()} <= {"works", "open", "stale", "upstream", "none"}
    recorded = {file.stem for file in proofs.RESULTS.glob("*.json")}
    assert {row.key for row in dx.methods() if row.status in ("works", "stale")} == recorded
    assert dx.get_method("deis").status == "upstream"
    assert dx.get_method("principles_of_diffusion").status == "none"


def test_unknown_names_say_what_is_there():
    with pytest.raises(ValueError, match=r"no method 'deepcahce'. Did you mean 'deepcache'"):
        dx.get_method("deepcahce")
    with pytest.raises(ValueError, match="`area` is 'speed'; allowed are acceleration, audio"):
        dx.methods("speed")
    with pytest.raises(ValueError, match=r"no checkpoint 'avatar'.*avatars-sd"):
        dx.zoo_path("avatar")
    with pytest.raises(ValueError, match="`form` of method 'x' is 'magic'"):
        dx.Method(key="x", title="X", area="other", form="magic")
    with pytest.raises(AttributeError, match="no attribute 'DeepCash'"):
        dx.DeepCash  # noqa: B018


def test_every_public_name_is_importable():
    assert sorted(dx.__all__) == sorted(registry.LAZY_NAMES)
    for name in dx.__all__:
        assert getattr(dx, name) is not None


def test_listing_imports_nothing_heavy():
    run_fresh(
        """
        import sys
        import diffusers_ext as dx
        assert len(dx.methods()) >= 289
        [row.status for row in dx.methods()]
        heavy = {"torch", "diffusers", "transformers", "numpy", "PIL"} & set(sys.modules)
        assert not heavy, heavy
        """
    )


@pytest.mark.parametrize("first", ["diffusers_ext", "diffusers"])
def test_registration_works_in_both_import_orders(first):
    run_fresh(
        f"""
        import sys
        if {first!r} == "diffusers":
            import diffusers.pipelines.pipeline_loading_utils
        import diffusers_ext as dx
        if {first!r} == "diffusers_ext":
            assert "diffusers" not in sys.modules
        import diffusers
        from diffusers.pipelines import pipeline_loading_utils as loader
        assert "ModelMixin" in loader.LOADABLE_CLASSES["diffusers_ext"]
        assert not [finder for finder in sys.meta_path if type(finder).__module__.startswith("diffusers_ext")]
        assert "diffusers_ext.metrics.judge" not in sys.modules
        assert diffusers.AvatarJudge is dx.AvatarJudge
        assert dx.ModelMixin is diffusers.ModelMixin
        judge = diffusers.AutoModel.from_pretrained(str(dx.zoo_path("avatars-judge")))
        assert isinstance(judge, dx.AvatarJudge)
        try:
            diffusers.NoSuchClass
        except AttributeError as error:
            assert "NoSuchClass" in str(error)
        else:
            raise AssertionError
        """
    )


def test_another_package_adds_a_method(tmp_path):
    package = tmp_path / "tiny_methods"
    package.mkdir()
    (package / "__init__.py").write_text(
        "from diffusers_ext import Method\n"
        "class TinyConfig: pass\n"
        "ROWS = [Method(key='tiny', title='Tiny', area='acceleration', form='hook', entry=('tiny_methods.TinyConfig',))]\n"
    )
    info = tmp_path / "tiny_methods-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny-methods\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[diffusers_ext.methods]\ntiny = tiny_methods:ROWS\n")
    run_fresh(
        f"""
        import sys
        sys.path.insert(0, {str(tmp_path)!r})
        import diffusers_ext as dx
        assert dx.get_method("tiny") in dx.methods("acceleration") and len(dx.methods()) >= 290
        assert dx.get_method("tiny").module == "tiny_methods"
        import tiny_methods
        assert dx.TinyConfig is tiny_methods.TinyConfig
        """
    )


def test_our_classes_are_written_as_loadable_entries():
    """A module called like one of diffusers' pipelines would be written as `[that, class]`, and could not be loaded."""
    from diffusers.pipelines.pipeline_loading_utils import _fetch_class_library_tuple

    judge = dx.AvatarJudge.from_pretrained(dx.zoo_path("avatars-judge"))
    assert _fetch_class_library_tuple(judge) == ("diffusers_ext", "AvatarJudge")


@pytest.mark.skipif(sys.platform == "win32", reason="links")
def test_the_front_page_links_lead_into_the_package():
    root = Path(registry.PACKAGE_DIR).parent
    for name in ("schedulers", "pipelines", "training", "hub_cards"):
        link = root / name
        if link.is_symlink():  # a clone without links works as well
            assert link.resolve() == registry.PACKAGE_DIR / name
