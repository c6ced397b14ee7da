"""Engines chained on a GPU: numbers, order of the calls, memory, and errors; the GPU is a double in host memory."""

import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest

from runtime import BackendError, Classifier, InputError
from runtime.manifest import read_manifest

FLAVOURS = ("tensorrt", "tensorrt_rtx")


def assert_same_answers(actual, expected):
    assert np.allclose(actual.residuals, expected.residuals, rtol=1e-5)
    assert np.array_equal(actual.selected, expected.selected)
    assert np.allclose(actual.logits, expected.logits, atol=1e-5)
    assert np.array_equal(actual.task_index, expected.task_index)


@pytest.mark.parametrize("compose", ["tsvm", "sum"])
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_answers_equal_those_of_the_cpu_for_sets_of_every_size(engine_bundle, toy, flavour, compose):
    directory, pixel_values = engine_bundle(flavour, compose), toy.pixel_values(48)
    with Classifier(directory, "tensorrt") as gpu_classifier, Classifier(directory, "cpu") as cpu_classifier:
        assert gpu_classifier.provider == "tensorrt"
        for images in (pixel_values, pixel_values[:1], pixel_values[:7]):
            expected = cpu_classifier.forward(images)
            assert_same_answers(gpu_classifier.forward(images), expected)
        assert {int(n) for n in cpu_classifier.forward(pixel_values).selected.sum(axis=1)} == {1, 2, 3}


def test_images_go_to_the_gpu_once_and_only_residuals_and_logits_come_back(engine_bundle, toy, gpu):
    directory, pixel_values = engine_bundle(), toy.pixel_values(8)
    with Classifier(directory, "tensorrt") as classifier:
        classifier.forward(pixel_values)  # cores of the sets are on the device from now on
        gpu.events.clear()
        result = classifier.forward(pixel_values)
    image_bytes = pixel_values.nbytes
    copies = [event for event in gpu.events if event[0] == "copy"]
    up = [event[2] for event in copies if event[1] == "HostToDevice"]
    down = [event[2] for event in copies if event[1] == "DeviceToHost"]
    assert up.count(image_bytes) == 1
    sizes = result.selected.sum(axis=1)
    assert sum(up) - image_bytes <= 12 * 8 * 3  # slots and weights of every run
    assert down[0] == result.residuals.nbytes
    assert sum(down[1:]) == result.logits.nbytes
    assert len(down) == 1 + len(set(sizes))


def test_passes_are_enqueued_in_order_on_one_stream(engine_bundle, toy, gpu):
    with Classifier(engine_bundle(), "tensorrt", mode="top1") as classifier:
        classifier.forward(toy.pixel_values(5))
    streams = {event[-1] for event in gpu.events if event[0] in ("copy", "execute", "profile", "synchronize")}
    assert len(streams) == 1
    kinds = [event[:2] if event[0] == "execute" else event[0] for event in gpu.events]
    first, second = kinds.index(("execute", "first_pass")), kinds.index(("execute", "second_pass"))
    assert kinds[first - 1] == "copy"
    assert "synchronize" in kinds[first:second]  # the residuals
    assert kinds[second:].count("synchronize") >= 1


def test_the_profile_of_one_set_or_of_many_is_chosen_by_the_batch(engine_bundle, toy, gpu):
    with Classifier(engine_bundle(), "tensorrt") as classifier:
        classifier.forward(toy.pixel_values(6), tasks=["birds"])
        assert not [event for event in gpu.events if event[0] == "profile"]
        classifier.forward(toy.pixel_values(16))
        assert ("profile", 1) in [event[:2] for event in gpu.events]


def test_buffers_are_reused_and_all_are_freed_on_close(engine_bundle, toy, gpu):
    pixel_values = toy.pixel_values(8)
    with Classifier(engine_bundle(), "tensorrt") as classifier:
        classifier.forward(pixel_values)
        held = len(gpu.device), len(gpu.pinned)
        for _ in range(3):
            classifier.forward(pixel_values)
        assert (len(gpu.device), len(gpu.pinned)) == held
        assert gpu.device
    assert not gpu.device
    assert not gpu.pinned
    assert gpu.events[-1] == ("destroy stream", 7001)
    classifier.close()


def test_buffers_are_freed_when_a_run_fails(engine_bundle, toy, gpu):
    classifier = Classifier(engine_bundle(), "tensorrt")
    gpu.fail["execute"] = "the kernel was lost"
    with pytest.raises(BackendError, match=r"TensorRT refuses \(execution\): the kernel was lost"):
        classifier.forward(toy.pixel_values(3))
    gpu.fail.clear()
    classifier.forward(toy.pixel_values(3))
    classifier.close()
    assert not gpu.device
    assert not gpu.pinned
    with pytest.raises(BackendError, match="closed"):
        classifier.forward(toy.pixel_values(3))


@pytest.mark.parametrize("what", ["deserialize", "context"])
def test_a_refused_engine_carries_tensorrts_words_and_frees_the_stream(engine_bundle, gpu, what):
    gpu.fail[what] = "plan file version mismatch"
    with pytest.raises(BackendError, match="plan file version mismatch"):
        Classifier(engine_bundle(), "tensorrt")
    assert gpu.events[-1][0] == "destroy stream"
    assert not gpu.device


def test_out_of_memory_is_an_error_with_the_size(engine_bundle, toy, gpu):
    gpu.capacity = 4096
    with (
        Classifier(engine_bundle(), "tensorrt") as classifier,
        pytest.raises(
            BackendError, match=r"allocating .* MiB of GPU memory: CUDA error 2, cudaErrorMemoryAllocation"
        ),
    ):
        classifier.forward(toy.pixel_values(16))
    assert not gpu.device


def test_memory_that_is_only_kept_is_freed_before_giving_up(engine_bundle, toy, gpu):
    with Classifier(engine_bundle(), "tensorrt") as classifier:
        for count in (1, 2, 4, 8):
            classifier.forward(toy.pixel_values(count), tasks=["birds"])
        gpu.capacity = sum(len(block) for block in gpu.device.values()) + 2 * toy.pixel_values(1).nbytes
        classifier.forward(toy.pixel_values(16), tasks=["birds"])


def test_two_threads_get_the_answers_of_their_own_images(engine_bundle, toy):
    directory = engine_bundle()
    batches = [toy.pixel_values(6)[::-1] if i % 2 else toy.pixel_values(6) for i in range(12)]
    with Classifier(directory, "cpu") as classifier:
        expected = [classifier.forward(batch) for batch in batches]
    with Classifier(directory, "tensorrt") as classifier, ThreadPoolExecutor(2) as pool:
        for actual, wanted in zip(pool.map(classifier.forward, batches), expected, strict=True):
            assert_same_answers(actual, wanted)


def test_two_classifiers_share_a_gpu(engine_bundle, toy):
    directory, pixel_values = engine_bundle(), toy.pixel_values(4)
    with Classifier(directory, "tensorrt") as kept:
        with Classifier(directory, "tensorrt") as other:
            assert_same_answers(other.forward(pixel_values), kept.forward(pixel_values))
        kept.forward(pixel_values)


def test_batches_beyond_the_engine_are_run_in_parts(engine_bundle, toy, gpu):
    with Classifier(engine_bundle(), "tensorrt", batch_size=64) as classifier:
        classifier.forward(toy.pixel_values(40))
    batches = [event[2] for event in gpu.events if event[:2] == ("execute", "first_pass")]
    assert batches == [16, 16, 8]


def test_sets_beyond_the_engine_name_the_profiles_and_what_to_do(engine_bundle, toy):
    with Classifier(engine_bundle(slots=1), "tensorrt") as classifier:
        classifier.forward(toy.pixel_values(2), tasks=["birds"])
        with pytest.raises(BackendError, match=r"'K': [23].*none of the engine's profiles.*--slots"):
            classifier.forward(toy.pixel_values(16))


def test_an_engine_of_another_version_names_both(engine_bundle):
    with pytest.raises(
        BackendError, match=r"tensorrt_rtx 1\.7\.1; its engines: tensorrt_rtx 1\.6\.0 for Ampere"
    ):
        Classifier(engine_bundle(version="1.6.0"), "tensorrt", build_engines=False)


def test_a_version_compatible_engine_runs_on_a_later_version_only(engine_bundle, toy):
    older = engine_bundle(version="1.6.0", options=("version_compatible",))
    with Classifier(older, "tensorrt") as classifier:
        classifier.forward(toy.pixel_values(2))
    newer = engine_bundle(version="1.8.0", options=("version_compatible",))
    with pytest.raises(BackendError, match=r"1\.8\.0"):
        Classifier(newer, "tensorrt", build_engines=False)


def test_engines_for_other_gpus_are_refused_by_name_and_auto_goes_on(engine_bundle, gpu):
    directory = engine_bundle(compute_capability=("12.0",))
    with pytest.raises(BackendError, match=r"compute capability 8\.6.*tensorrt_rtx 1\.7\.1 for 12\.0"):
        Classifier(directory, "tensorrt", build_engines=False)
    with Classifier(directory, "auto", build_engines=False) as classifier:
        assert classifier.provider == "cpu"
    gpu.capability = (12, 0)
    with Classifier(directory, "auto") as classifier:
        assert classifier.provider == "tensorrt"


def test_portable_engines_do_not_run_before_ampere(engine_bundle, gpu):
    gpu.capability = (7, 5)
    with pytest.raises(BackendError, match=r"7\.5.*Ampere and later"):
        Classifier(engine_bundle(), "tensorrt", build_engines=False)


def test_without_the_module_that_built_the_engines_the_error_says_so(engine_bundle, monkeypatch):
    directory = engine_bundle("tensorrt")
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(BackendError, match="install what built those"):
        Classifier(directory, "tensorrt")


def test_cuda_graphs_record_a_batch_that_comes_again_and_replay_it_from_then_on(engine_bundle, toy, gpu):
    pixel_values = toy.pixel_values(4)
    with Classifier(engine_bundle("tensorrt"), "tensorrt", cuda_graphs=True) as classifier:
        results = [classifier.forward(pixel_values, tasks=["birds"]) for _ in range(3)]
        gpu.events.clear()
        results += [classifier.forward(pixel_values, tasks=["birds"]) for _ in range(4)]
        kinds = [event[0] for event in gpu.events if event[0] in ("execute", "begin capture", "launch graph")]
        assert kinds[-3:] == ["launch graph"] * 3
        assert kinds.count("begin capture") <= 1
    assert [event[0] for event in gpu.events].count("destroy graph") == 1
    for result in results[1:]:
        assert np.array_equal(result.logits, results[0].logits)


def test_tensorrt_rtx_records_cuda_graphs_by_itself(engine_bundle, toy, gpu):
    with Classifier(engine_bundle(), "tensorrt", cuda_graphs=True) as classifier:
        for _ in range(3):
            classifier.forward(toy.pixel_values(2))
    assert "begin capture" not in [event[0] for event in gpu.events]


class OnTheGpu:
    """Another library's array."""

    def __init__(self, gpu, array, **interface):
        address = gpu._allocate(gpu.device, array.nbytes)[1]
        np.ctypeslib.as_array(gpu.device[address])[:] = array.reshape(-1).view(np.uint8)
        self.__cuda_array_interface__ = {
            "shape": array.shape, "typestr": array.dtype.str, "data": (address, True), "version": 3,
            "strides": None, **interface,
        }  # fmt: skip


def test_arrays_of_other_libraries_are_used_where_they_are(engine_bundle, toy, gpu):
    pixel_values = toy.pixel_values(6)
    with Classifier(engine_bundle(), "tensorrt") as classifier:
        expected = classifier.forward(pixel_values)
        gpu.events.clear()
        result = classifier.forward(OnTheGpu(gpu, pixel_values, stream=42))
    assert_same_answers(result, expected)
    assert gpu.events[:2] == [("record", 42), ("wait", 7001)]
    assert not [e for e in gpu.events if e[:2] == ("copy", "HostToDevice") and e[2] >= pixel_values.nbytes]


class ThroughDlpack:
    """An array of a library that has DLPack alone; the capsule is numpy's."""

    def __init__(self, gpu, array, device=0):
        address = gpu._allocate(gpu.device, array.nbytes)[1]
        memory = np.ctypeslib.as_array(gpu.device[address])
        self.array = memory.view(array.dtype).reshape(array.shape)
        self.array[:] = array
        self.device, self.streams = device, []

    def __dlpack_device__(self):
        return 2, self.device

    def __dlpack__(self, *, stream):
        self.streams.append(stream)
        return self.array.__dlpack__()


def test_arrays_with_dlpack_are_used_where_they_are(engine_bundle, toy, gpu):
    pixel_values = toy.pixel_values(6)
    foreign = ThroughDlpack(gpu, pixel_values)
    with Classifier(engine_bundle(), "tensorrt") as classifier:
        expected = classifier.forward(pixel_values[2:])
        gpu.events.clear()
        foreign.array = foreign.array[2:]
        result = classifier.forward(foreign)
    assert_same_answers(result, expected)
    assert foreign.streams == [7001]
    assert not [e for e in gpu.events if e[:2] == ("copy", "HostToDevice") and e[2] >= foreign.array.nbytes]


def test_unfit_arrays_with_dlpack_are_input_errors(engine_bundle, toy, gpu):
    with Classifier(engine_bundle(), "tensorrt") as classifier:
        flipped, half = ThroughDlpack(gpu, toy.pixel_values(2)), toy.pixel_values(2).astype(np.float16)
        flipped.array = flipped.array.transpose(0, 1, 3, 2)
        for unfit, match in (
            (flipped, "contiguous"),
            (ThroughDlpack(gpu, half), "expected float32, got float16"),
            (ThroughDlpack(gpu, toy.pixel_values(2), device=1), "on GPU 0, got one on GPU 1"),
        ):
            with pytest.raises(InputError, match=match):
                classifier.forward(unfit)


def test_unfit_arrays_of_other_libraries_are_input_errors(engine_bundle, toy, gpu):
    pixel_values = toy.pixel_values(2)
    with Classifier(engine_bundle(), "tensorrt") as classifier:
        for unfit, match in (
            (OnTheGpu(gpu, pixel_values, strides=(1, 2, 3, 4)), "contiguous"),
            (OnTheGpu(gpu, pixel_values.astype(np.float64)), "float32"),
            (OnTheGpu(gpu, pixel_values[:, :2]), "shape"),
        ):
            with pytest.raises(InputError, match=match):
                classifier.forward(unfit)
    with Classifier(engine_bundle(), "cpu") as classifier, pytest.raises(InputError, match="numpy array"):
        classifier.forward(OnTheGpu(gpu, pixel_values))


def test_stripped_engines_get_their_weights_from_the_onnx_file(engine_bundle, toy):
    directory = engine_bundle(options=("weight_stripped",))
    refitter = sys.modules["tensorrt_rtx"].OnnxParserRefitter
    with Classifier(directory, "tensorrt") as classifier:
        classifier.forward(toy.pixel_values(2))
    files = [call.args[0] for call in refitter.return_value.refit_from_file.call_args_list]
    assert files == [str(directory / spec.file) for spec in read_manifest(directory).passes.values()]
    refitter.return_value.refit_from_file.return_value = False
    with pytest.raises(BackendError, match="the weights do not fit"):
        Classifier(directory, "tensorrt")


def test_without_a_gpu_tensorrt_says_what_cuda_says(engine_bundle, gpu, monkeypatch):
    directory = engine_bundle()
    none = SimpleNamespace(
        **{name: getattr(gpu.real_cuda, name) for name in ("cudaError_t", "cudaDeviceAttr")}
    )
    none.cudaGetErrorString = gpu.real_cuda.cudaGetErrorString
    none.cudaDeviceGetAttribute = lambda *_: (gpu.real_cuda.cudaError_t.cudaErrorInsufficientDriver, None)
    monkeypatch.setattr("cuda.bindings.runtime", none)
    with pytest.raises(BackendError, match="driver version is insufficient"):
        Classifier(directory, "tensorrt")
    with Classifier(directory, "auto") as classifier:
        assert classifier.provider == "cpu"
