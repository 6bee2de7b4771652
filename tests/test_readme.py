"""Every promise of README has a test that `make test` runs.

The table quotes README and names the tests, as MODULE::NAME without the `test_` of both. A quote
that no longer stands in README, a test that does not exist and a test that only `make test-all`
runs are failures here. So is a line of README's table of promises without a quote.
"""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

HERE = Path(__file__).parent
README = " ".join((HERE.parent / "README.md").read_text("utf-8").split())

PROMISES: dict[str, tuple[str, ...]] = {
    # ---- commands ----
    "# 0 clean, 2 corruptions, 3 leaks only": (
        "cli_info_map_check::check_of_a_clean_image",
        "cli_info_map_check::check_finds_damage_in_the_header",
        "cli_info_map_check::check_calls_data_under_a_clear_bit_a_leak",
    ),
    "# down into golden.img": ("cli_jobs::commit_moves_allocated_clusters_into_the_backing",),
    "# vm2.raw is now the whole disk": ("cli_jobs::flatten_discard_removes_only_the_add_cow_file",),
    "# the guest's view, as a new file": ("cli_jobs::convert_writes_the_guests_view",),
    "Images are identical.": ("compare::equal_disks_in_any_two_forms_are_identical",),
    "# which file holds what": ("cli_info_map_check::map_json_tells_the_layers_apart",),
    "The commands of `addcow io` are those of qemu-io.": (
        "cli_io::write_and_read_report_like_qemu_io",
    ),
    "Options, size suffixes and JSON keys are those of qemu-img.": (
        "cli_info_map_check::info_human_reads_like_qemu_img",
        "partial_sectors::map_of_a_tail_equals_qemu_img",
    ),
    "`addcow COMMAND --help` lists every option.": ("startup::help_lists_every_command",),
    "[docs/errors.md](docs/errors.md) lists every error": (
        "errors::every_error_can_be_caused_by_a_user",
    ),
    # ---- exit statuses, signals, outputs ----
    "one line on stderr names the file and says what to do": (
        "cli_info_map_check::unusable_file_is_named_in_one_line",
    ),
    "the check failed, corruptions, leaks only, not an add-cow file": (
        "cli_info_map_check::check_of_a_file_that_is_not_add_cow_exits_with_63",
    ),
    "something could not be verified, something differs": (
        "manifest::verify_reports_a_layer_without_manifest",
        "scrub::scrub_status_exits_with_1_for_unverified_layers",
    ),
    "the images differ, the images could not be compared": (
        "compare::different_disks_in_any_two_forms_differ",
        "compare::compare_names_the_file_that_it_cannot_open",
    ),
    "| 64 | the command line is invalid |": ("errors::invalid_command_line_exits_with_64",),
    "`--time-limit` was reached; finished work is kept, the same command continues": (
        "farm_jobs::time_limit_leaves_the_remaining_images",
    ),
    "stopped by SIGHUP, Ctrl-C, SIGTERM or SIGXCPU; finished work is kept": (
        "signals::first_signal_stops_a_commit_that_keeps_its_work",
    ),
    "A hangup that nohup ignores stays ignored.": ("signals::ignored_hangup_stays_ignored",),
    "progress lines are dropped when the reader is slow": (
        "outputs::progress_is_dropped_without_a_reader",
    ),
    "warnings and results are delivered late": (
        "outputs::blocked_stderr_does_not_stop_the_job",
        "outputs::blocked_stdout_does_not_stop_the_job",
    ),
    "a log that cannot be written is abandoned with a warning": (
        "outputs::log_that_cannot_be_written_is_reported_once",
    ),
    "If standard output fails, the command reports it on stderr": (
        "outputs::failed_output_after_a_job_is_reported",
    ),
    # ---- names, devices, locks ----
    "addcow opens them only beneath the directory": (
        "hostile_images::names_open_files_beneath_the_overlays_directory_only",
    ),
    "A symbolic link to an overlay changes nothing": (
        "links::every_command_reads_the_same_through_a_link",
    ),
    "may lead only beneath the directories and roots of the farm": (
        "links::link_in_a_farm_leads_only_beneath_its_directories",
    ),
    "allow more directories": ("hostile_images::root_allows_files_beneath_it",),
    "use `--root` for a directory with a colon in its name": (
        "byte_names::root_directory_may_have_any_name",
    ),
    "It refuses the name if both exist and differ.": (
        "links::create_refuses_a_name_that_means_two_files",
    ),
    "It stores the name relative to the overlay, and an absolute name as typed.": (
        "links::create_stores_a_name_of_the_working_directory_relative_to_the_overlay",
        "links::create_stores_absolute_names_as_typed",
    ),
    "It says which `--root` the users of the new overlay need.": (
        "hostile_images::create_names_the_root_that_users_need",
    ),
    "with several hard links is read with a warning, and not written without `--force`": (
        "links::hard_linked_files_are_read_with_a_warning_and_not_written",
    ),
    "are readable by no more users than the most restrictive file of the chain": (
        "permissions::new_files_are_no_more_readable_than_the_most_restrictive_file",
    ),
    "Block devices need `--allow-device`.": ("hostile_images::block_devices_need_allow_device",),
    "FIFOs, sockets and files of /proc are refused without waiting.": (
        "hostile_images::only_regular_files_are_opened",
        "hostile_images::files_of_proc_are_refused",
    ),
    "Formats are never guessed.": ("hostile_images::data_of_a_guest_does_not_choose_a_format",),
    "refuse a raw file that begins like another format, without `--force`": (
        "command_line_names::create_refuses_a_raw_backing_that_begins_like_another_format",
    ),
    "`-` is not a file name, except in `--from-file -`.": (
        "command_line_names::dash_is_not_a_file_name",
    ),
    "It refuses a device that is mounted, used as swap, mapped or held by another program": (
        "held_devices::commit_into_a_mounted_device_is_refused",
        "held_devices::free_device_is_claimed_and_written",
    ),
    "a file beneath a loop device that is in use": (
        "held_devices::file_beneath_a_mounted_loop_device_is_refused",
    ),
    "`KEY-base64` beside every such `KEY` holds the bytes": (
        "byte_names::json_has_the_bytes_of_a_name_that_is_not_utf8",
        "byte_names::log_has_the_bytes_of_a_name_that_is_not_utf8",
    ),
    "Every file of a chain is locked as QEMU locks it": (
        "locks::each_file_is_locked_as_the_table_says",
    ),
    "A file system without such locks is refused in one line.": (
        "locking_off::command_without_locks_names_the_file_and_the_option",
    ),
    "a job that writes then prints a warning": (
        "locking_off::commit_with_locking_off_warns_and_succeeds",
    ),
    "`-U` takes locks where it can.": ("locks::force_share_reads_what_a_guest_is_writing",),
    # ---- farms ----
    "takes directories, files, patterns and `--from-file FILE`": (
        "farm::farm_accepts_files_and_patterns",
        "farm::farm_reads_names_from_a_file_or_stdin",
        "byte_names::list_of_names_may_be_separated_by_nul",
    ),
    "It finds overlays by their content, not by their names.": (
        "farm::farm_ls_finds_overlays_by_content",
    ),
    "is in every list as *not-examined*, with the reason": (
        "unexamined::unexamined_file_is_in_every_list_with_its_reason",
    ),
    "or 2 if corruption is found": ("unexamined::corruption_outranks_an_unexamined_file",),
    "leaves files out of every list and does not enter excluded directories": (
        "unexamined::excluded_file_is_in_no_list",
        "unexamined::exclude_patterns_match_names_and_paths",
    ),
    "If a list is empty, stderr gives the reason": (
        "unexamined::directory_without_overlays_is_reported",
        "unexamined::named_file_that_is_no_overlay_is_reported",
    ),
    "such a file refuses every job on the image": (
        "unexamined::unreadable_file_refuses_only_images_of_its_directory",
    ),
    "it refuses jobs that change files which others may depend on": (
        "unexamined::commit_is_refused_while_a_directory_beneath_a_root_is_unreadable",
    ),
    "It does not refuse `flatten`, which changes only its own image file.": (
        "unexamined::flatten_is_done_while_a_directory_beneath_a_root_is_unreadable",
    ),
    "follow the same rule and have the same option": (
        "unexamined::job_of_one_image_checks_for_unreadable_files",
    ),
    "mark files that are missing, form a cycle, changed beneath their overlays": (
        "farm_graph::missing_backing_is_shown_as_a_root",
        "farm_graph::cycle_is_shown_once_with_its_return",
        "farm_graph::base_written_after_its_overlays_is_marked_as_changed",
    ),
    "is *unnamed* only if every file that could name it was examined": (
        "farm_graph::unnamed_files_are_listed_last",
        "unexamined::no_file_is_unnamed_while_an_outside_overlay_is_unexamined",
    ),
    "`check` exits with the status of the worst image": (
        "farm::farm_check_exits_with_the_status_of_the_worst_image",
    ),
    "(the same as `--dry-run`) changes nothing": (
        "farm_jobs::farm_plan_equals_dry_run_and_the_job_follows_it",
    ),
    "It opens every file of a *ready* image for writing.": (
        "plan_checks::plan_refuses_files_of_another_owner",
    ),
    "It exits with 1 if some image is refused and none is ready.": (
        "plan_checks::plan_with_a_ready_image_exits_with_0",
    ),
    "prints one line for each cause of a refusal, with three examples": (
        "plan_checks::plan_prints_one_line_for_refusals_of_one_cause",
    ),
    "the deepest chains first, small images side by side, large images split": (
        "farm_jobs::farm_commit_commits_a_chain_down_to_its_base",
        "farm_jobs::farm_job_splits_a_large_image_among_processes",
    ),
    "(`--on-error stop` begins no further image)": (
        "farm_jobs::on_error_stop_begins_nothing_after_a_failure",
    ),
    "An image that does not fit is refused before its first byte is written.": (
        "farm_jobs::farm_job_refuses_an_image_that_does_not_fit_and_does_the_others",
    ),
    "The same command again does the remaining images.": (
        "farm_jobs::farm_job_again_does_only_the_remaining_images",
    ),
    "`--verify` reads each image back": (
        "verify_option::farm_job_with_verify_reports_the_digest_of_each_image",
    ),
    "`-r`, `--idle` and `--time-limit` limit the load.": (
        "copy_methods::rate_is_exceeded_by_at_most_an_eighth_and_a_step",
        "idle::idle_option_applies_to_every_process",
    ),
    "`--progress-fd N` give progress to programs": (
        "farm_jobs::farm_job_progress_goes_to_a_descriptor",
    ),
    "`--log FILE` appends a JSON object for each event": ("farm_jobs::farm_log_has_every_event",),
    # ---- integrity ----
    "beside each layer of the chain that has none": (
        "manifest::guest_digest_is_that_of_the_guests_view",
    ),
    "the same for an overlay, the flattened image and the converted disk": (
        "manifest_kills::guest_digest_is_that_of_the_converted_disk",
        "manifest_kills::guest_digest_is_equal_after_flatten",
    ),
    "They name the file and the bytes that differ": (
        "manifest::verify_names_every_damaged_leaf_and_no_other",
    ),
    "A command that changes a layer removes its manifest before the first write.": (
        "manifest::command_that_changes_a_layer_removes_its_manifest",
    ),
    "reads a base that overlays share once": (
        "farm_manifest::farm_manifest_create_reads_a_shared_base_once",
    ),
    "an image that fails does not stop the others (exit status 1)": (
        "farm_manifest::farm_manifest_create_continues_after_a_failed_image",
    ),
    "[docs/manifest.md](docs/manifest.md) gives the format byte by byte": (
        "oracle_manifest::oracle_accepts_manifests_of_random_chains",
    ),
    "read them back from the disk and compare": (
        "verify_option::verify_option_reads_from_the_disk_and_not_from_memory",
    ),
    "It is an error if another program keeps such a file mapped": (
        "verify_option::verify_option_reports_a_failed_read_back",
    ),
    "It starts with the layer that was not verified for the longest time": (
        "scrub::scrub_begins_with_the_longest_unverified_layer",
    ),
    "runs for at most `--time-limit`, and reads no faster than `--limit-rate`": (
        "scrub::scrub_with_a_time_limit_of_zero_reads_nothing",
        "scrub::scrub_rate_applies_to_all_workers_together",
    ),
    "The same command continues there, also after a crash.": (
        "scrub::killed_scrub_keeps_finished_layers",
    ),
    "reads a random part of each layer, at least one leaf of each": (
        "scrub::sample_reads_no_more_than_it_reports",
        "scrub::smallest_sample_reads_one_leaf_of_each_layer",
    ),
    "counts files that no longer exist": ("scrub::scrub_status_counts_files_that_no_longer_exist",),
    # ---- the table of promises ----
    "After any interruption of a job, every guest's view is unchanged": (
        "faults::command_continues_after_a_fault_at_any_event",
        "kills::job_continues_after_its_parent_was_killed",
        "kills::job_survives_a_killed_worker",
    ),
    "A bit on disk always has its data there": (
        "powercut::power_cut_loses_nothing",
        "write_order::flush_syncs_data_before_it_publishes_bits",
    ),
    "A failed sync is final": (
        "faults::failed_sync_of_data_publishes_nothing",
        "pool::nothing_is_published_after_a_failed_sync_in_a_worker",
    ),
    "Too little space is reported before the first byte, with both figures": (
        "space::flatten_that_cannot_fit_is_refused",
        "space::full_disk_keeps_finished_clusters",
    ),
    "If a worker dies, a file shrinks or a sector is bad, the message names file": (
        "kills::cluster_that_kills_every_worker_is_named",
        "kills::shrinking_source_is_named",
        "kills::bad_sector_is_named",
    ),
    "A file that a guest uses is refused, in both directions": (
        "locks::file_held_by_qemu_is_refused_or_shared",
        "locks::qemu_is_refused_files_that_a_job_holds",
    ),
    "A file that other overlays need is not changed without `--force`": (
        "dependants::commit_checks_for_dependants_of_its_raw_backing",
        "links::io_refuses_a_write_beneath_other_overlays",
    ),
    "an image file of two overlays is never changed": (
        "dependants::shared_image_is_refused_even_with_force",
    ),
    "An overlay means the same by every path that leads to it": (
        "links::every_command_reads_the_same_through_a_link",
        "links::farm_lists_an_image_once_through_links",
    ),
    "The check of a farm finds every fault and reports no others": (
        "mkfarm::farm_check_finds_every_planted_fault_and_no_other",
    ),
    "A commit or flatten of a farm leaves every guest's view unchanged, however it ends": (
        "farm_kills::farm_job_survives_a_worker_killed_once",
        "farm_kills::error_fails_one_image_and_keeps_every_guests_view",
        "farm_kills::image_in_use_by_a_guest_is_refused",
    ),
    "A flipped bit is named with its leaf of 64 KiB, and no other leaf is": (
        "manifest::verify_names_every_damaged_leaf_and_no_other",
        "manifest::verify_names_damage_in_header_and_bitmap",
        "manifest_kills::manifest_killed_while_written_is_never_used",
    ),
    "A scrub loses no result, however it ends, and reads nothing twice in a round": (
        "scrub::stopped_scrub_keeps_finished_layers",
        "scrub::killed_scrub_keeps_finished_layers",
    ),
    "`--verify` finds data that the disk does not return": (
        "verify_option::verify_option_finds_a_flipped_byte",
    ),
    "A hostile header, name or chain costs one error line": (
        "hostile_images::header_numbers_are_checked_before_they_cost_anything",
        "hostile_images::names_open_files_beneath_the_overlays_directory_only",
        "fuzz_finds::no_stored_scene_shows_a_fault",
    ),
    "A crash costs at most 512 MiB or 5 seconds of repeated work": (
        "checkpoints::kill_within_a_task_costs_at_most_five_seconds",
    ),
    "`commit -d` and `convert` start again from the beginning.": (
        "signals::first_signal_stops_a_convert_that_leaves_nothing",
    ),
    "`-t unsafe` skips every sync and says so.": ("farm_jobs::farm_job_warns_of_unsafe_once",),
    "`-t none` bypasses the page cache.": (
        "copy_methods::direct_io_leaves_no_pages_in_the_page_cache",
    ),
    "`make soak MINUTES=10` runs random kills, faults and power cuts": (
        "soak::soak_reports_the_survived_cases",
    ),
    "File systems without shared mappings": (
        "no_mappings::job_without_shared_mappings_has_the_same_result",
        "no_mappings::verify_option_without_shared_mappings_is_refused_before_any_change",
    ),
    "`ADDCOW_FAULTS` names a file of rules for fault injection": (
        "faults::invalid_rule_file_is_refused",
    ),
    # ---- speed, Python ----
    "`make bench` runs both sides of each comparison": (
        "bench::bench_compares_with_the_median_of_the_fastest_peer",
    ),
    "cost the start of Python": ("startup::command_loads_no_heavy_modules",),
    "`open`, `create`, `commit`, `flatten`, `convert`, `check`, `info` and `extents`": (
        "api::paths_are_accepted_as_str_bytes_and_path_objects",
    ),
}


@cache
def functions_in(module: str) -> dict[str, ast.FunctionDef]:
    """The test functions of a module, by name."""
    tree = ast.parse((HERE / f"test_{module}.py").read_text("utf-8"))
    return {one.name: one for one in tree.body if isinstance(one, ast.FunctionDef)}


def is_long(test: ast.FunctionDef) -> bool:
    """Whether `make test` leaves all cases of a test out."""
    marks = {ast.unparse(one) for one in test.decorator_list}
    return bool(marks & {"pytest.mark.long", "pytest.mark.slow"})


@pytest.mark.parametrize("quote", PROMISES)
def test_promise_stands_in_readme_and_make_test_runs_its_tests(quote: str) -> None:
    assert quote in README, "README does not say that any more"
    assert PROMISES[quote], "no test is named"
    for name in PROMISES[quote]:
        module, _, test = name.partition("::")
        assert f"test_{test}" in functions_in(module), f"{name} does not exist"
        assert not is_long(functions_in(module)[f"test_{test}"]), f"make test does not run {name}"


def test_every_promise_of_the_table_is_quoted() -> None:
    rows = re.search(r"\| promise \| how it is tested \| \|---\|---\| (.*?\|) [^|]+##", README)
    assert rows is not None
    for row in rows[1].split(" | | "):
        promise = row.strip("| ").partition(" | ")[0]
        assert any(quote in promise or promise in quote for quote in PROMISES), promise
