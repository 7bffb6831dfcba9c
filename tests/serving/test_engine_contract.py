"""What the engine relies on in transformers, which is private there: one test that says what moved."""

import dataclasses
import importlib
import inspect

import pytest

from helpers import serving

transformers = pytest.importorskip("transformers")
pytest.importorskip("transformers", minversion="5.22", reason="the engine wants transformers 5.22 or newer")

MODULE = "transformers.generation.continuous_batching."
# what is called or replaced -> its first parameters, without self
SIGNATURES = {
    "continuous_api.ContinuousBatchingManager": "model generation_config continuous_batching_config",
    "continuous_api.ContinuousBatchingManager.switch_to_cb_friendly_attn": "model auto_switch_to_flash",
    "continuous_api.ContinuousBatchingManager.start": "",
    "continuous_api.ContinuousBatchingManager.stop": "block timeout keep_for_next_session hard_stop",
    "continuous_api.ContinuousBatchingManager.is_running": "",
    "continuous_api.ContinuousBatchingManager.get_result": "request_id timeout",
    "continuous_api.ContinuousBatchingManager.cancel_request": "request_id",
    "continuous_api.ContinuousBatchingManager.register_result_handler": "request_id callback",
    "continuous_api.ContinuousBatchingManager.add_request": (
        "input_ids request_id max_new_tokens streaming record_timestamps eos_token_id"
    ),
    "continuous_api.ContinuousBatchingManager._run_generation_loop": "",
    "continuous_api.ContinuousBatchingManager._generation_loop_body": "batch_processor bootstrapping",
    "continuous_api.ContinuousBatchingManager._generation_step": "",
    "continuous_api.ContinuousBatchingManager._create_batch_processor": "",
    "continuous_api.ContinuousBatchProcessor.has_pending_requests": "",
    "continuous_api.OutputRouter.deliver": "output",
    "continuous_api.BackgroundThreadStatus.can_accept_new_requests": "",
    "scheduler.FIFOScheduler": "cache safety_margin max_requests_per_batch",
    "scheduler.FIFOScheduler.schedule_batch": "token_budget cache_budget",
    "scheduler.FIFOScheduler._get_waiting_candidates": "",
    "scheduler.FIFOScheduler.finish_request": "request_id",
    "cache.PagedAttentionCache.search_prefix_match": "request_id prompt_ids",
    "cache.PagedAttentionCache.mark_complete_blocks": "state complete_blocks",
    "cache.PagedAttentionCache.update": "key_states value_states layer_idx kwargs",
    "cache.PagedAttentionCache.compute_free_capacity": "",
    "cache_allocators.CacheAllocator.match_prefix_blocks": "prompt_ids",
    "cache_allocators.CacheAllocator.mark_complete_blocks": "request_id token_ids new_new_blocks",
    "cache_allocators.CacheAllocator.get_seqlen_k": "past_length query_length",
    "model_runner.infer_max_single_request_tokens": "cache",
    "model_runner.ModelRunner.supports_logits_to_keep": "model",
    "model_runner.ModelRunner.compute_batch": "model batch_data",
    "requests.RequestState.to_generation_output": "",
    "requests.GenerationOutput.is_finished": "",
    "utils.stream_context": "stream",
    "cb_logits_processors.ContinuousBatchingLogitsProcessorList.check_kwargs": "kwargs",
    "cb_logits_processors.ContinuousBatchingLogitsProcessor.fill_defaults": "int32_tensor",
    "cb_logits_processors.ContinuousBatchingLogitsProcessor.prepare_tensor_args": "requests_with_new_token",
    "cb_logits_processors.ContinuousBatchingLogitsProcessor.__call__": "scores tensor_arg",
    "~integrations.sdpa_attention.sdpa_attention_forward": "module query key value attention_mask",
    "~integrations.eager_paged.eager_paged_attention_forward": "module query key value attention_mask",
}
FIELDS = {
    "requests.RequestState": (
        "request_id initial_tokens generated_tokens logprobs position_offset logit_processor_kwargs created_time "
        "error _true_initial_tokens"
    ),
    "requests.GenerationOutput": "request_id prompt_ids generated_tokens logprobs error status",
    "~generation.configuration_utils.ContinuousBatchingConfig": (
        "page_size num_blocks max_batch_tokens max_requests_per_batch auto_switch_to_flash use_cuda_graph "
        "use_async_batching varlen_compile_config decode_compile_config default_compile_level return_logprobs "
        "scheduler_type allow_block_sharing"
    ),
}
# of a manager that runs nothing yet: the path to an object -> its attributes
ATTRIBUTES = {
    "": (
        "model input_queue output_router background_thread_status logit_processor generation_config batch_processor "
        "continuous_batching_config _wake_up_loop"
    ),
    "output_router": "output_queue result_handlers _lock",
    "background_thread_status": "fatal_error",
    "logit_processor": "logits_processor tensors_required do_processing supported_keys ignored_keys",
    "batch_processor": "scheduler cache inputs_and_outputs model_runner max_batch_tokens",
    "batch_processor.scheduler": "active_requests waiting_requests waiting_requests_order block_new_requests",
    "batch_processor.inputs_and_outputs": "requests_in_batch output_ids compute_stream",
    "batch_processor.model_runner": "_model_supports_logits_to_keep",
    "batch_processor.cache": "cache_allocators layer_to_allocator",
    "batch_processor.cache.layer_to_allocator.0": "layer_type tokens_per_page ledger pool block_table index",
    "batch_processor.cache.layer_to_allocator.0.ledger": (
        "hash_to_block block_to_hash register_new_hash acquire release"
    ),
    "batch_processor.cache.layer_to_allocator.0.pool": "free_blocks",
}


def find(name):
    """The object of this dotted name, from ``transformers`` with "~" in front; None if there is none."""
    module, *rest = ("transformers." + name[1:] if name.startswith("~") else MODULE + name).rsplit(".", name.count("."))
    parts = f"{module}.{'.'.join(rest)}".split(".")
    for end in range(len(parts) - 1, 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            found = getattr(found, part, None)
        return found
    return None


def moved(folder):
    """(name, expected, found) of everything that is not as the engine expects it."""
    for name, expected in SIGNATURES.items():
        if (found := find(name)) is None:
            yield name, "a function or a class", "none"
            continue
        parameters = [p for p in inspect.signature(found).parameters if p != "self"]
        if parameters[: len(expected.split())] != expected.split():
            yield name, f"({', '.join(expected.split())}, ...)", f"({', '.join(parameters)})"
    for name, expected in FIELDS.items():
        known = {field.name for field in dataclasses.fields(found)} if (found := find(name)) else set()
        yield from ((f"{name}.{field}", "a field", "none") for field in expected.split() if field not in known)
    slots = getattr(find("requests.FutureRequestState"), "__slots__", ())
    for slot in ("state", "has_new_token", "complete_blocks", "query_length"):
        if slot not in slots:
            yield f"requests.FutureRequestState.{slot}", "a slot", f"{slots}"
    if "fifo" not in (find("scheduler.SCHEDULER_MAPPING") or {}):
        yield "scheduler.SCHEDULER_MAPPING", "a scheduler 'fifo'", "none"
    if not hasattr(find("requests.RequestStatus"), "FAILED"):
        yield "requests.RequestStatus.FAILED", "a status", "none"
    model = serving.load_model(serving.write_tiny_llama(folder))
    sizes = dict(page_size=8, num_blocks=64, max_batch_tokens=16, max_requests_per_batch=4, auto_switch_to_flash=False)
    config = transformers.ContinuousBatchingConfig(**sizes, use_cuda_graph=False, use_async_batching=False)
    manager = find("continuous_api.ContinuousBatchingManager")(model, transformers.GenerationConfig(), config)
    manager.batch_processor = manager._create_batch_processor()
    for path, expected in ATTRIBUTES.items():
        owner = manager
        for part in filter(None, path.split(".")):
            owner = owner[int(part)] if part.isdigit() else getattr(owner, part, None)
        for name in expected.split():
            if not hasattr(owner, name):
                yield f"manager.{path}.{name}", "an attribute", f"none of a {type(owner).__name__}"


def test_what_the_engine_reaches_into_is_where_it_was(tmp_path):
    """Of the installed release, whether it is one of ``TESTED_TRANSFORMERS`` or not."""
    found = [f"{name}: expected {expected}, found {there}" for name, expected, there in moved(tmp_path)]
    assert not found, f"transformers {transformers.__version__}\n" + "\n".join(found)
