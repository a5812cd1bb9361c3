"""What every engine outside torch has to keep: the tests that their files inherit."""

import gc
import sys
import warnings

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from course_utils import backends, data, integer, measure, models
from tests.conftest import fingerprint
from tests.test_backends_pt2e import Block

# What must not be read in a file: where it was made.
FOLDERS = (*(f"/{name}/".encode() for name in ("tmp", "home", "root")), b"site-packages")


def need(engine):
    """Skip the test where `engine` does not run."""
    (found,) = [e for e in backends.engines(*(f for f, names in backends.FAMILIES.items() if engine in names))
                if e.name == engine]  # fmt: skip
    if not found.runs:
        pytest.skip(found.why)


def hide(monkeypatch, family, *packages):
    """Let `packages` be absent, and the file of `family` be loaded anew."""
    monkeypatch.delitem(sys.modules, f"course_utils.backends.{family}", raising=False)
    for package in packages:
        for name in [n for n in sys.modules if n == package or n.startswith(f"{package}.")] or [package]:
            monkeypatch.setitem(sys.modules, name, None)


def relative_error(found, expected):
    return float((found - expected).norm() / expected.norm())


class Contract:
    """The tests; a family's file says its `engine`, the `package` it comes from, and the `observers` that it has."""

    engine = package = None
    observers = ("minmax",)

    @pytest.fixture(scope="class")
    @classmethod
    def block(cls):
        need(cls.engine)
        torch.manual_seed(0)
        return Block().eval()

    @pytest.fixture(scope="class")
    @classmethod
    def expected(cls, block, images):
        with torch.no_grad():
            return block(images)

    @pytest.fixture(scope="class")
    @classmethod
    def int8(cls, block, calibration):
        return backends.quantize_static(block, calibration, engine=cls.engine)

    @pytest.fixture(scope="class")
    @classmethod
    def fp32(cls, block):
        return backends.deploy(block, engine=cls.engine, image_shape=(3, 32, 32))

    @pytest.fixture(scope="class")
    @classmethod
    def saved(cls, int8, tmp_path_factory):
        path = tmp_path_factory.mktemp("saved") / "int8.safetensors"
        assert backends.save(int8, path) == path.stat().st_size
        return path

    def test_logits_are_close_to_torchs(self, int8, fp32, expected, images):
        for model, most in ((fp32, 1e-5), (int8, 0.06)):
            found = model(images)
            assert found.dtype == torch.float32 and found.shape == expected.shape and not found.requires_grad
            assert relative_error(found, expected) < most
        assert not torch.equal(int8(images), fp32(images))

    def test_another_network_is_another_program(self, fp32, images):
        torch.manual_seed(1)
        other = Block().eval()
        found = backends.deploy(other, engine=self.engine, image_shape=(3, 32, 32))(images)
        with torch.no_grad():
            assert relative_error(found, other(images)) < 1e-5 < relative_error(found, fp32(images))

    def test_any_number_of_images_gives_each_its_own_logits(self, int8, fp32, images):
        for model, most in ((fp32, 1e-5), (int8, 0.02)):
            together = model(images)
            for n in (1, 7):
                found = model(images[:n])
                assert found.shape == (n, 10) and relative_error(found, together[:n]) < most
            assert relative_error(model(torch.cat([images] * 3)), torch.cat([together] * 3)) < most

    def test_an_answer_is_not_overwritten_by_the_next(self, int8, images):
        first = int8(images[:1])
        kept = first.clone()
        int8(images[1:2])
        assert torch.equal(first, kept)

    def test_images_of_another_size_or_type_are_refused(self, int8, fp32, images):
        for model in (int8, fp32):
            with pytest.raises(ValueError, match=r"shape \(3, 32, 32\), got \(3, 16, 16\).*make it again"):
                model(images[:, :, :16, :16])
            with pytest.raises(ValueError, match="float32 images, got torch.float64"):
                model(images.double())

    def test_a_reloaded_model_gives_identical_outputs_and_needs_no_float_one(self, int8, saved, images, tmp_path):
        loaded = backends.load(saved)
        assert torch.equal(loaded(images), int8(images))
        assert backends.recipe_of(loaded) == backends.recipe_of(int8)
        backends.save(loaded, tmp_path / "again")
        assert tmp_path.joinpath("again").read_bytes() == saved.read_bytes()

    def test_float_models_have_a_file_too(self, fp32, images, tmp_path):
        backends.save(fp32, tmp_path / "model")
        loaded = backends.load(tmp_path / "model")
        assert torch.equal(loaded(images), fp32(images))
        assert backends.recipe_of(loaded)["precision"] == "fp32"
        assert measure.size_on_disk(fp32) == tmp_path.joinpath("model").stat().st_size

    def test_the_file_holds_the_engines_own_bytes_and_names_no_folder(self, saved):
        tensors = load_file(saved)
        assert tensors and all(tensor.dtype == torch.uint8 for tensor in tensors.values())
        content = saved.read_bytes()
        assert not [folder for folder in FOLDERS if folder in content]

    def test_a_damaged_file_is_refused(self, saved, tmp_path):
        changed = bytearray(saved.read_bytes())
        changed[-9] ^= 4
        (tmp_path / "model").write_bytes(changed)
        with pytest.raises(ValueError, match="is damaged.*checksum"):
            backends.load(tmp_path / "model")

    def test_it_leaves_the_float_model_alone_and_says_nothing(self, block, calibration, expected, images, capfd):
        model = Block().train()
        model.load_state_dict(block.state_dict())
        before = fingerprint(model)
        capfd.readouterr()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            int8 = backends.quantize_static(model, calibration, engine=self.engine)
            fp32 = backends.deploy(model, engine=self.engine, image_shape=(3, 32, 32))
        assert fingerprint(model) == before and all(m.training for m in model.modules())
        assert relative_error(fp32(images), expected) < 1e-5 and relative_error(int8(images), expected) < 0.06
        assert capfd.readouterr() == ("", "")

    def test_other_ways_to_quantize_work_and_survive_the_file(self, block, int8, calibration, images, tmp_path):
        options = [{"per_channel": False}, {"reduce_range": not backends.needs_headroom(self.engine)}]
        options += [{"observer": "histogram"}] if "histogram" in self.observers else []
        for option in options:
            other = backends.quantize_static(block, calibration, engine=self.engine, **option)
            assert option.items() <= backends.recipe_of(other).items()
            assert not torch.equal(other(images), int8(images)), f"{option} changed nothing"
            overflows = not option.get("reduce_range", True)  # asked for only where the default leaves headroom
            assert overflows or relative_error(other(images), int8(images)) < 0.1
            backends.save(other, tmp_path / "model")
            assert torch.equal(backends.load(tmp_path / "model")(images), other(images))

    def test_an_observer_it_does_not_have_is_refused(self, block, calibration):
        for observer in {"minmax", "histogram"} - set(self.observers):
            with pytest.raises(ValueError, match=f"{self.engine!r} has no range of least squared error.*minmax"):
                backends.quantize_static(block, calibration, engine=self.engine, observer=observer)

    def test_the_ranges_come_from_all_calibration_batches(self, block, images):
        def logits_of(batches):
            return backends.quantize_static(block, batches, engine=self.engine)(images)

        both = logits_of([images, 10 * images])
        assert torch.equal(both, logits_of((x, None) for x in (10 * images, images)))
        assert not torch.equal(both, logits_of([images]))

    def test_calibration_without_images_is_refused(self, block):
        with pytest.raises(ValueError, match="calibration set is empty"):
            backends.quantize_static(block, [], engine=self.engine)

    def test_what_it_cannot_do_it_says(self, block, int8, images):
        for ask in (integer.IntegerModel, backends.reference, lambda model: backends.integers(model, images)):
            with pytest.raises(ValueError, match=f"{self.engine!r} is a runtime of its own.*one of torch's"):
                ask(int8)
        with pytest.raises(ValueError, match=f"{self.engine!r} does not train.*course_utils.qat"):
            backends.prepare_qat(block, engine=self.engine)
        with pytest.raises(ValueError, match="was made for engine"):
            backends.deploy(int8, engine=self.engine)

    def test_it_leaves_torchs_threads_alone(self, block, images):
        before = torch.get_num_threads()
        backends.deploy(block, engine=self.engine, image_shape=(3, 32, 32))(images)
        assert torch.get_num_threads() == before

    def test_without_its_package_it_is_a_sentence_and_the_others_run(self, calibration, monkeypatch):
        family = next(f for f, names in backends.FAMILIES.items() if self.engine in names)
        hide(monkeypatch, family, self.package)
        (found,) = backends.engines(family)
        assert not found.runs and f"squeeze-and-speed-up[{family}]" in found.why and "ENGINES=1" in found.why
        for make in (
            lambda: backends.quantize_static(Block(), calibration, engine=self.engine),
            lambda: backends.deploy(Block(), engine=self.engine),
        ):
            with pytest.raises(RuntimeError, match=f"{self.engine!r} does not run here: .*that do: "):
                make()

    def test_resnet18_predicts_as_before_and_its_file_is_a_quarter(self, tmp_path):
        need(self.engine)
        model = models.load("resnet18")
        calibration = data.batches(data.fashion_mnist("calibration"), 32, limit=64)
        images = torch.cat([x for x, _ in data.batches(data.fashion_mnist("test"), 50, limit=200)])
        with torch.no_grad():
            expected = model(images)
        before = float_bytes()
        int8 = backends.quantize_static(model, calibration, engine=self.engine)
        assert float_bytes() - before < 2**20, "a float copy of the network stayed behind"
        found = torch.cat([int8(part) for part in images.split(50)])
        assert relative_error(found, expected) < 0.06
        assert (found.argmax(1) == expected.argmax(1)).double().mean() >= 0.97
        assert backends.recipe_of(int8)["architecture"] == {"name": "resnet18", "num_classes": 10}
        assert measure.size_on_disk(model) / backends.save(int8, tmp_path / "model") == pytest.approx(4, abs=0.1)


def float_bytes():
    """Return the bytes of all float32 tensors that are alive."""
    gc.collect()
    tensors = [o for o in gc.get_objects() if type(o) in (torch.Tensor, nn.Parameter) and o.dtype == torch.float32]
    return sum(tensor.nbytes for tensor in tensors)
