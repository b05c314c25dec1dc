"""What `make test-fast` runs beside tests/core and tests/walls: one test a feature, in both frameworks."""

from __future__ import annotations

# file in tests/both -> the test that shows best whether the feature lives
FAST = {
    "test_ascend.py": "test_a_sparse_model_becomes_a_w16a16s_folder",
    "test_calibration.py": "test_a_set_calibrates_and_the_text_it_is_from_cannot_judge",
    "test_checkpoint.py": "test_a_net_saved_by_hand_comes_back",
    "test_checkpoint_trainable.py": "test_arguments_are_those_of_the_seed",
    "test_compare_models.py": "test_a_model_is_at_no_distance_from_itself",
    "test_convert.py": "test_rules_there_and_back_bit_for_bit",
    "test_delta_apply.py": "test_merge_and_unload_leaves_plain_layers",
    "test_delta_front.py": "test_a_prefix_stands_in_front_of_keys_and_values",
    "test_delta_layers.py": "test_lora_dense_computes_its_formula",
    "test_delta_travel.py": "test_the_bundle_holds_only_what_was_trained",
    "test_distill.py": "test_the_soft_loss_is_the_weighted_sum_of_its_terms",
    "test_distill_cache.py": "test_all_classes_give_the_online_loss",
    "test_export.py": "test_zeros_survive_export",
    "test_freeze.py": "test_include_freezes_and_exclude_trains",
    "test_jobs.py": "test_magnitude_needs_no_calibration",
    "test_prune_proof.py": "test_a_plan_is_proved_behind_a_layer_norm",
    "test_prune_twins.py": "test_a_plan_of_one_framework_cuts_the_other",
    "test_sparse.py": "test_every_method_reaches_the_exact_ratio",
    "test_sparse_zeros.py": "test_masks_of_a_compressor_are_taken",
    "test_students.py": "test_a_student_by_a_builder_has_the_teachers_blocks",
    "test_train.py": "test_history_holds_each_epoch",
    "test_train_callbacks.py": "test_early_stopping_waits_and_stops",
    "test_weights.py": "test_first_equals_slicing",
}


def is_fast(folder: str, file: str, function: str) -> bool:
    """Whether a test belongs to the inner loop: its folder below tests/, its file's and its function's name."""
    return folder in ("core", "walls") or (folder == "both" and FAST.get(file) == function)
