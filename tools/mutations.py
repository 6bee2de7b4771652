"""The mutations of ``make mutate``: faults made on purpose, and the tests that must catch them.

Each one breaks a rule of the project. A test function is named without its parameters: all its
cases are tried, those of the long walks too.
"""

from __future__ import annotations

from typing import NamedTuple


class Mutation(NamedTuple):
    """Replace ``old``, which stands once in ``file``, by ``new``; one of ``tests`` must fail."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


def _in(module: str, *names: str) -> tuple[str, ...]:
    """The tests of one test module."""
    return tuple(f"tests/test_{module}.py::test_{name}" for name in names)


_PUBLISHER = "addcow_mp/engine/publisher.py"
_OVERLAY = "addcow_mp/device/overlay.py"
_LOCKS = "addcow_mp/device/locks.py"
_REBASE = "addcow_mp/jobs/rebase.py"
_RESET = "addcow_mp/jobs/reset.py"
_DEPENDANTS = "addcow_mp/jobs/dependants.py"
_INTO, _COVERED = "addcow_mp/jobs/commit_base.py", "addcow_mp/engine/covered.py"
_RESIZE = "addcow_mp/jobs/resize.py"
_EXPORT, _IMPORT = "addcow_mp/jobs/qemu_export.py", "addcow_mp/jobs/qemu_import.py"

MUTATIONS = (
    # The order of a resize
    Mutation(
        "resize: bits before the data that was copied up is synced",
        _RESIZE,
        "    image.sync()\n    try:\n",
        "    try:\n",
        _in("resize", "growing_keeps_the_order"),
    ),
    Mutation(
        "resize: the new length before the bits",
        _RESIZE,
        "        _lengthen_bitmap(overlay, size, runs)\n        image.set_length(size)\n",
        "        image.set_length(size)\n        _lengthen_bitmap(overlay, size, runs)\n",
        _in("resize", "growing_keeps_the_order"),
    ),
    Mutation(
        "resize: bits are cleared before the shorter image is synced",
        _RESIZE,
        "        image.cut(size)\n    image.sync()\n",
        "        image.cut(size)\n",
        _in("resize", "shrinking_keeps_the_order"),
    ),
    Mutation(
        "resize: bits behind the bitmap's new end stay",
        _RESIZE,
        "    if overlay.cow.length > end:\n        overlay.cow.set_length(end)\n",
        "",
        _in("resize", "bits_in_later_clusters_of_the_bitmap_do_not_come_back"),
    ),
    Mutation(
        "resize: the old last cluster is not copied up",
        _RESIZE,
        "    if runs:\n        _copy_up_last(overlay)\n",
        "",
        _in("resize", "new_part_reads_zeros_over_a_longer_backing"),
    ),
    Mutation(
        "resize: bytes behind the old end stay",
        _RESIZE,
        "    image.make_zero(old, image.length)\n",
        "",
        _in("resize", "new_part_reads_zeros_over_a_longer_backing"),
    ),
    # The order of the publisher
    Mutation(
        "publisher: bits before the data is synced",
        _PUBLISHER,
        "        self._data.sync()\n",
        "        pass\n",
        _in("write_order", "commit_into_a_raw_backing_keeps_the_order"),
    ),
    Mutation(
        "publisher: the overlay's bits without those of the backing file",
        _PUBLISHER,
        "            self._backing.publish((), 1, below)\n",
        "            pass\n",
        _in("write_order", "commit_into_an_add_cow_backing_keeps_the_order"),
    ),
    Mutation(
        "publisher: marks made during the sync are published",
        _PUBLISHER,
        "            self._publish(self._overlay, finished.ended, parts, last=last)\n",
        "            parts = self._marked(TOP, finished.under_way)\n"
        "            self._publish(self._overlay, finished.ended, parts, last=last)\n",
        _in("checkpoints", "clusters_finished_during_a_sync_are_not_published_by_it"),
    ),
    Mutation(
        "publisher: space is freed before the bits are cleared",
        _PUBLISHER,
        "        overlay.publish(ended, self._value, new)\n",
        "        if self._frees:\n"
        "            self._free(overlay, ended)\n"
        "        overlay.publish(ended, self._value, new)\n",
        _in("write_order", "commit_into_a_raw_backing_keeps_the_order"),
    ),
    Mutation(
        "publisher: the space of committed clusters is not freed",
        _PUBLISHER,
        "        if self._frees:\n            self._free(overlay, ended)\n",
        "        if False:\n            self._free(overlay, ended)\n",
        _in("write_order", "commit_into_a_raw_backing_keeps_the_order"),
    ),
    # Flush of a guest's writes
    Mutation(
        "flush: bits without their data",
        _OVERLAY,
        "        self.image.file.sync()\n        if not announced:\n",
        "        if not announced:\n",
        _in("write_order", "flush_syncs_data_before_it_publishes_bits"),
    ),
    Mutation(
        "flush: writes made during the sync are published",
        _OVERLAY,
        "        self.publish(announced.runs(), 1)\n",
        "        self.publish(self.pending.runs(), 1)\n",
        _in("write_order", "flush_does_not_publish_writes_made_during_its_sync"),
    ),
    Mutation(
        "flush: a failed flush is forgotten",
        _OVERLAY,
        "                self._failed = error\n",
        "                pass\n",
        _in("write_order", "changes_are_refused_after_a_failed_flush"),
    ),
    Mutation(
        "write: partly written clusters are not copied up",
        _OVERLAY,
        "            self._copy_up_around(offset, offset + length)\n",
        "            pass\n",
        _in("properties", "write_copies_up_the_rest_of_its_cluster"),
    ),
    # The short path of a guest's requests
    Mutation(
        "requests: a cluster counts as allocated whatever its bit says",
        "addcow_mp/format/bitmap.py",
        "        return page[cluster % PAGE_BITS] == 1\n",
        "        return True\n",
        _in("device_threads", "reader_beside_a_writer_sees_what_was_flushed"),
    ),
    Mutation(
        "requests: a bit is looked for in the file before memory",
        _OVERLAY,
        "self.pending.is_set(cluster) or self.bitmap.is_set(cluster)",
        "self.bitmap.is_set(cluster) or self.pending.is_set(cluster)",
        _in("device_threads", "written_cluster_is_never_taken_for_unallocated_during_a_flush"),
    ),
    Mutation(
        "requests: kept pages of the bitmap outlive a change",
        "addcow_mp/format/bitmap.py",
        "                self._drop_pages(begin * BITS_PER_BYTE, end * BITS_PER_BYTE)\n",
        "                pass\n",
        _in("device_threads", "written_cluster_is_never_taken_for_unallocated_during_a_flush"),
    ),
    Mutation(
        "requests: pages of the bitmap are kept while others may write it",
        "addcow_mp/format/bitmap.py",
        "                if self._alone:\n",
        "                if True:\n",
        _in("device_threads", "reader_beside_a_writer_sees_what_was_flushed"),
    ),
    Mutation(
        "requests: two first writes of a cluster do not wait for each other",
        _OVERLAY,
        "        with self._range_lock.holding(first, stop):\n",
        "        if True:\n",
        _in("device_threads", "copy_up_never_overwrites_the_data_of_another_thread"),
    ),
    Mutation(
        "bits: those past the last cluster stay set",
        _OVERLAY,
        "            self.bitmap.clear_stray()\n",
        "            pass\n",
        _in("write_order", "commit_clears_bits_past_the_end"),
    ),
    Mutation(
        "bits: they are not synced",
        _OVERLAY,
        "            self.bitmap.clear_stray()\n        self.cow.sync()\n",
        "            self.bitmap.clear_stray()\n",
        _in(
            "write_order", "flatten_sets_the_flag_last", "commit_into_a_raw_backing_keeps_the_order"
        ),
    ),
    # Done map and transfer
    Mutation(
        "done map: what a dead worker process has marked is moved again",
        "addcow_mp/engine/transfer.py",
        "        if not marks.any(task.first, task.stop):\n",
        "        if True:\n",
        _in("checkpoints", "clusters_that_a_dead_worker_finished_are_not_moved_again"),
    ),
    Mutation(
        "done map: a cluster is marked before all of it is moved",
        "addcow_mp/engine/run_marks.py",
        "        return round_down(position, self._unit) // self._geometry.cluster_size\n",
        "        return min(self._stop, round_down(position, self._unit) "
        "// self._geometry.cluster_size + 1)\n",
        _in("checkpoints", "checkpoint_within_a_task_publishes_only_finished_clusters"),
    ),
    Mutation(
        "transfer: holes of the source stay data in the target",
        "addcow_mp/engine/transfer.py",
        "                file.make_zero(start, stop)\n",
        "                pass\n",
        _in("write_order", "commit_of_zeros_makes_them_durable_first"),
    ),
    Mutation(
        "tasks: two tasks share a byte of a bitmap",
        "addcow_mp/engine/allocation.py",
        "    return BITS_PER_BYTE * max(",
        "    return max(",
        _in("task_planning", "tasks_share_no_byte_of_any_bitmap"),
    ),
    Mutation(
        "pool: a task whose worker died is not tried again",
        "addcow_mp/engine/pool.py",
        "TRIES = 2\n",
        "TRIES = 1\n",
        _in("pool", "task_that_kills_its_worker_once_is_done"),
    ),
    # Space
    Mutation(
        "space: what is given back counts at once",
        "addcow_mp/engine/space.py",
        "waiting_weight - waiting[0][0] >= lag:",
        "waiting_weight >= 0:",
        _in("space", "peak_agrees_with_a_plain_computation"),
    ),
    Mutation(
        "space: copied up bytes are not counted",
        "addcow_mp/engine/space.py",
        "        if not isinstance(self._plan.target, OverlayTarget):\n",
        "        if True:\n",
        _in("space", "space_check_counts_copied_up_data"),
    ),
    Mutation(
        "space: a job begins although its data does not fit",
        "addcow_mp/engine/space.py",
        "    if needed > free:\n",
        "    if needed > 1 << 62:\n",
        _in("space", "flatten_that_cannot_fit_is_refused"),
    ),
    # Read-back
    Mutation(
        "read-back: memory is compared instead of the disk",
        "addcow_mp/jobs/readback.py",
        "            drop_cached(file)\n",
        "            pass\n",
        _in("verify_option", "verify_option_reads_from_the_disk_and_not_from_memory"),
    ),
    Mutation(
        "read-back: a difference is no error",
        "addcow_mp/jobs/readback.py",
        "    if differing:\n",
        "    if False:\n",
        _in("verify_option", "verify_option_finds_a_flipped_byte"),
    ),
    # Idle, rate
    Mutation(
        "idle: the priority is not lowered",
        "addcow_mp/engine/throttle.py",
        "    if number is None or not wanted:\n",
        "    if True:\n",
        _in("idle", "idle_option_applies_to_every_process"),
    ),
    Mutation(
        "rate: each process gets the whole rate",
        "addcow_mp/engine/throttle.py",
        "rate // max(1, processes)",
        "rate",
        _in("copy_methods", "several_workers_share_one_limit"),
    ),
    # Chains, names, sizes
    Mutation(
        "names: they are relative to the link and not to the file",
        "addcow_mp/device/location.py",
        "    return path if plain else real\n",
        "    return path\n",
        _in("links", "commit_through_a_link_writes_into_its_own_base"),
    ),
    Mutation(
        "names: a chain may lead outside its directory",
        "addcow_mp/device/access.py",
        "        raise OutsideError(path=path, ",
        "        return os.open(path, _mode(writable))\n        raise OutsideError(path=path, ",
        _in("hostile_images", "names_open_files_beneath_the_overlays_directory_only"),
    ),
    Mutation(
        "chain: one file may be two of its layers",
        "addcow_mp/device/chain.py",
        "        if other is not None:\n",
        "        if False:\n",
        _in("hostile_images", "image_as_its_own_backing_is_refused"),
    ),
    Mutation(
        "sizes: a raw backing file loses its odd tail",
        "addcow_mp/format/geometry.py",
        "    return round_up(length, SECTOR)\n",
        "    return round_down(length, SECTOR)\n",
        _in("partial_sectors", "sizes_of_raw_disks_are_rounded_up_everywhere"),
    ),
    Mutation(
        "sizes: an odd image is rounded up",
        "addcow_mp/format/geometry.py",
        "    return round_down(length, SECTOR)\n",
        "    return round_up(length, SECTOR)\n",
        _in("properties", "device_reads_what_the_model_holds"),
    ),
    Mutation(
        "format: a set bit of the unknown features is ignored",
        "addcow_mp/format/header.py",
        "    if header.features and header.lent_id is None:\n",
        "    if False:\n",
        _in("format", "one_edit_of_a_header_breaks_one_rule"),
    ),
    # Locks and dependants
    Mutation(
        "locks: a reader shares the file with a writer",
        _LOCKS,
        "READING = Claim(_READ, _ALL - {Permission.WRITE, Permission.RESIZE})",
        "READING = Claim(_READ, _ALL)",
        _in(
            "locks",
            "file_held_by_qemu_is_refused_or_shared",
            "each_file_is_locked_as_the_table_says",
        ),
    ),
    Mutation(
        "locks: a conflict is not an error",
        _LOCKS,
        "    if conflict is not None:\n        permission, byte = conflict\n",
        "    if False:\n        permission, byte = conflict\n",
        _in("locks", "file_held_by_qemu_is_refused_or_shared"),
    ),
    Mutation(
        "dependants: other overlays of the base are not found",
        _DEPENDANTS,
        "file.identity in (one.backing, one.image)",
        "file.identity == one.image",
        _in("dependants", "commit_checks_for_dependants_of_its_raw_backing"),
    ),
    Mutation(
        "dependants: --force overrides a shared image file",
        _DEPENDANTS,
        "    if others:\n",
        "    if False:\n",
        _in("dependants", "shared_image_is_refused_even_with_force"),
    ),
    # Lending to QEMU
    Mutation(
        "lending: the twin is enabled before the overlay is marked",
        _EXPORT,
        "absolute=absolute).with_disabled(True)\n",
        "absolute=absolute)\n",
        _in("qemu_lending", "overlay_and_twin_can_never_both_be_written"),
    ),
    Mutation(
        "lending: the mark is cleared while QEMU can open the twin",
        _IMPORT,
        "    if twin is not None and not twin.header.disabled:\n",
        "    if False:\n",
        (
            *_in("qemu_lending", "overlay_and_twin_can_never_both_be_written"),
            *_in("guest", "machine_that_waits_for_a_migration_cannot_write_after_import"),
        ),
    ),
    Mutation(
        "lending: layers below can be changed",
        _EXPORT,
        "        _lend_layers(overlay, result)\n",
        "        pass\n",
        _in("qemu_lending", "layer_below_is_lent_until_its_last_overlay_is_back"),
    ),
    Mutation(
        "lending: the rest of a partly allocated cluster is not copied up",
        _IMPORT,
        "                overlay.copy_up(one.start, one.stop, buffer)\n",
        "                pass\n",
        _in("qemu_lending", "import_copies_up_what_qemu_has_not_and_writes_its_zeros"),
    ),
    Mutation(
        "lending: zeros of QEMU are not written",
        _IMPORT,
        "                overlay.image.file.make_zero(one.start, one.stop)\n",
        "                pass\n",
        _in("qemu_lending", "import_copies_up_what_qemu_has_not_and_writes_its_zeros"),
    ),
    Mutation(
        "lending: a copy is taken for the original",
        _IMPORT,
        "    if copies:\n",
        "    if False:\n",
        _in("qemu_lending", "copy_of_a_farm_with_a_lent_overlay_cannot_write_into_the_original"),
    ),
    Mutation(
        "lending: a backing file that was removed counts as zeros",
        _IMPORT,
        "            elif extent.start < self._below:\n",
        "            elif False:\n",
        _in("qemu_lending", "import_refuses_a_backing_that_was_removed_without_copying"),
    ),
    Mutation(
        "lending: a lent overlay can be opened",
        "addcow_mp/device/chain.py",
        "    if header.lent or (changes and header.lent_for_reading):\n",
        "    if False:\n",
        _in("qemu_lending", "commands_that_change_a_lent_overlay_are_refused"),
    ),
    Mutation(
        "lending: what QEMU wrote into another data file is given up",
        _IMPORT,
        "            _refuse_other_data_file(overlay, lending)\n",
        "",
        _in("qemu_lending", "twin_whose_data_file_is_another_is_taken_back_only_when_adopted"),
    ),
    Mutation(
        "lending: a refusal does not name the program that has the twin open",
        "addcow_mp/device/twin.py",
        "    user = None if twin is None else user_of(twin)\n",
        "    user = None\n",
        _in("guest", "command_that_would_change_what_a_machine_uses_is_refused_and_names_it"),
    ),
    # Manifests
    Mutation(
        "manifest: it outlives a change of its layer",
        "addcow_mp/jobs/transfer_job.py",
        "            follower.remove(",
        "            (lambda *a, **k: None)(",
        _in("manifest", "command_that_changes_a_layer_removes_its_manifest"),
    ),
    Mutation(
        "manifests follow: one of another state is used",
        "addcow_mp/jobs/manifest.py",
        "    if _lasting(manifest.head) != _lasting(head):\n",
        "    if False:\n",
        _in("manifest_follows", "manifest_of_another_state_is_not_used"),
    ),
    Mutation(
        "manifests follow: a leaf that is read is not compared",
        "addcow_mp/engine/known_digest.py",
        "        if found[at] != view.digests[at]:\n",
        "        if False:\n",
        _in("manifest_follows", "damage_in_a_leaf_that_mixes_layers_is_not_hidden"),
    ),
    Mutation(
        "manifests follow: a mixed leaf that changes keeps its digest",
        "addcow_mp/engine/known_leaves.py",
        "        return group.held, group.mixed & ~changed\n",
        "        return group.held, group.mixed\n",
        _in("manifest_follows", "new_manifests_are_those_that_manifest_create_makes"),
    ),
    Mutation(
        "manifests follow: the leaf in which an overlay ends is taken over",
        "addcow_mp/jobs/following.py",
        "        if not rest or backing.size <= overlay.size:\n",
        "        if True:\n",
        _in("manifest_follows", "new_manifests_are_those_that_manifest_create_makes"),
    ),
    Mutation(
        "manifests follow: groups that became holes are forgotten",
        "addcow_mp/engine/known_digest.py",
        "        return iter(sorted({*found, *self.known.groups(first, min(stop, groups))}))\n",
        "        return found\n",
        _in("manifest_follows", "lost_data_is_found_where_a_hole_is"),
    ),
    Mutation(
        "manifests follow: a full disk fails the job",
        "addcow_mp/jobs/following.py",
        "            self._report.warnings.append(warning)\n",
        "            raise\n",
        _in("manifest_follows", "full_disk_costs_the_manifest_and_not_the_job"),
    ),
    Mutation(
        "permissions: a new image file is readable by everybody",
        "addcow_mp/device/permissions.py",
        "        if allowed != stat.S_IRGRP | stat.S_IROTH:\n",
        "        if False:\n",
        _in("permissions", "new_files_are_no_more_readable_than_the_base"),
    ),
    Mutation(
        "discard: bytes behind the virtual size stay in the raw disk",
        "addcow_mp/jobs/removal.py",
        "    image.cut(overlay.size)\n",
        "    pass\n",
        _in("partial_sectors", "discard_leaves_exactly_the_guests_disk"),
    ),
    # A stream in a running QEMU
    Mutation(
        "stream: the data file of the node is not looked at",
        "addcow_mp/jobs/qemu_nodes.py",
        "        if _identity(monitor, node.data_file) == wanted.image:\n",
        "        if node.data_file:\n",
        _in("qemu_stream", "twin_over_another_image_file_is_refused"),
    ),
    Mutation(
        "stream: relative names of QEMU are relative to addcow",
        "addcow_mp/jobs/qemu_nodes.py",
        '    return identity_at(os.path.join(f"/proc/{monitor.process}/cwd", path))\n',
        "    return identity_at(os.path.abspath(path))\n",
        _in("qemu_stream", "twin_is_found_by_its_files_and_not_by_its_name"),
    ),
    Mutation(
        "stream: a stop leaves the job in QEMU",
        "addcow_mp/jobs/qemu_stream.py",
        '                monitor.execute("job-cancel", id=job)\n',
        "                return problem, True\n",
        _in("qemu_stream", "stop_cancels_the_job_and_the_next_run_continues"),
    ),
    Mutation(
        "stream: the job of a killed command is in the way",
        "addcow_mp/jobs/qemu_stream.py",
        "    if _running(monitor, lent.job) is None:\n",
        "    if True:\n",
        _in("qemu_stream", "killed_command_leaves_a_job_that_the_next_one_follows"),
    ),
    Mutation(
        "stream: a job that failed counts as stopped",
        "addcow_mp/jobs/qemu_stream.py",
        "    if problem is not None:\n",
        "    if False:\n",
        _in("qemu_stream", "failed_copy_is_told_in_qemus_words_and_continues"),
    ),
    Mutation(
        "stream: old versions get sector twins",
        "addcow_mp/jobs/qemu_stream.py",
        "FIRST_FOR_SECTORS = (10, 0)\n",
        "FIRST_FOR_SECTORS = (0, 0)\n",
        _in("qemu_stream", "sector_twin_is_streamed_only_by_a_qemu_that_survives_it"),
    ),
    Mutation(
        "flatten: ALL_ALLOCATED is set before the bits",
        "addcow_mp/jobs/flatten.py",
        "                move([plan], report, options, job_hooks, shared.pool, follower)\n"
        "                _set_flag(overlay)\n",
        "                _set_flag(overlay)\n"
        "                move([plan], report, options, job_hooks, shared.pool, follower)\n",
        _in("write_order", "flatten_sets_the_flag_last"),
    ),
    Mutation(
        "copy: a file that has become shorter reads as zeros",
        "addcow_mp/device/files.py",
        "                    raise ended_early()\n",
        "                    return\n",
        _in("kills", "shrinking_source_is_named", "shrunk_source_is_an_error_and_not_a_hole"),
    ),
    # Rebase
    Mutation(
        "rebase: the header changes before the differing clusters are copied",
        _REBASE,
        "                if plan is None:\n",
        "                change.carry_out()\n                if plan is None:\n",
        _in("rebase", "rebase_keeps_the_order", "rebase_keeps_the_view_of_overlays_above"),
    ),
    Mutation(
        "rebase: the new backing file is not synced",
        _REBASE,
        "            sync_chain(self.new)\n",
        "            pass\n",
        _in("rebase", "rebase_keeps_the_order"),
    ),
    Mutation(
        "rebase: whole tasks are published",
        "addcow_mp/engine/publisher.py",
        "        if self._by_cluster:\n",
        "        if False:\n",
        _in("rebase", "rebase_shows_the_same_disk_and_copies_only_what_differs"),
    ),
    Mutation(
        "rebase: the new name is not synced before the header names it",
        "addcow_mp/device/renaming.py",
        "        overlay.cow.write(name, place)\n        overlay.cow.sync()\n",
        "        overlay.cow.write(name, place)\n",
        _in("rebase", "rebase_keeps_the_order"),
    ),
    Mutation(
        "rebase: the old name stays",
        "addcow_mp/device/renaming.py",
        "    if clear_unused(overlay):\n",
        "    if False:\n",
        _in("rebase", "new_name_goes_where_the_old_one_is_not_and_the_old_one_is_cleared"),
    ),
    Mutation(
        "rebase: blocks count as shared whatever the list says of them",
        "addcow_mp/device/fiemap.py",
        "            is_shared = flags & ~(_LAST | _MERGED) == _SHARED\n",
        "            is_shared = True\n",
        _in("rebase", "flags_of_extents_decide_whether_blocks_are_shared"),
    ),
    Mutation(
        "farm rebase: the new base is rebased as well",
        "addcow_mp/farm/rebasing.py",
        " and one.identity not in new]",
        "]",
        _in("rebase", "farm_rebase_leaves_the_new_base_and_its_chain_out"),
    ),
    # Commit -b
    Mutation(
        "commit -b: nothing is copied up",
        _INTO,
        "    return [down] if up is None else [up, down]\n",
        "    return [down]\n",
        _in("commit_base", "base_shows_what_the_guest_sees_and_every_other_view_stays"),
    ),
    Mutation(
        "commit -b: the base changes before what it held is above it",
        _INTO,
        "    return [down] if up is None else [up, down]\n",
        "    return [down] if up is None else [down, up]\n",
        _in("commit_base", "base_changes_only_after_what_it_held_is_durable_above_it"),
    ),
    Mutation(
        "commit -b: bits that a killed run left in memory count as durable",
        _INTO,
        "    levels.over.image.file.sync()\n    levels.over.cow.sync()\n",
        "",
        _in("commit_base", "bits_that_an_interrupted_run_left_in_memory_are_made_durable"),
    ),
    Mutation(
        "commit -b: other overlays of the base change",
        _INTO,
        "    changed = [*own_files(base), over.image.file]\n",
        "    changed = [over.image.file]\n",
        _in("commit_base", "commit_b_is_refused_and_changes_nothing"),
    ),
    Mutation(
        "commit -b: --force overrides lent overlays",
        _INTO,
        ", can_force_lent=False",
        "",
        _in("commit_base", "commit_b_is_refused_and_changes_nothing"),
    ),
    Mutation(
        "commit -b: manifests of changed layers stay",
        _INTO,
        "        changed=_changed(levels) if changes else (),\n",
        "        changed=(),\n",
        _in("commit_base", "manifests_of_changed_layers_are_removed_and_others_stay_true"),
    ),
    Mutation(
        "commit -b: the bits of clusters that were not copied up are set",
        _COVERED,
        "    leaves_some = True\n",
        "    leaves_some = False\n",
        _in("commit_base", "base_shows_what_the_guest_sees_and_every_other_view_stays"),
    ),
    Mutation(
        "commit -b: zeros behind the end of a layer do not count",
        _COVERED,
        "            if held < last:\n                yield held, last\n",
        "",
        _in("commit_base", "zeros_behind_a_short_middle_layer_reach_the_base"),
    ),
    Mutation(
        "commit -b: clusters are larger than what is covered",
        _COVERED,
        "    return min(*(overlay.cluster_size for overlay in overlays), *units)\n",
        "    return max(*(overlay.cluster_size for overlay in overlays), *units)\n",
        _in("commit_base", "only_what_is_covered_is_written_into_the_base"),
    ),
    # Reset
    Mutation(
        "reset: the bits are cleared one by one",
        _OVERLAY,
        "        self.cow.cut(self.header.header_size)\n",
        "        self.publish([(0, self.geometry.clusters)], 0)\n",
        _in("reset", "reset_keeps_the_order", "walk_of_reset_covers_every_event"),
    ),
    Mutation(
        "reset: the cut bitmap is not synced",
        _OVERLAY,
        "        self.cow.sync(attributes=True)\n",
        "",
        _in("reset", "reset_keeps_the_order"),
    ),
    Mutation(
        "reset: the manifest stays",
        _RESET,
        "            follower.remove([overlay], durable=overlay.cow.durable)\n",
        "",
        _in("reset", "reset_keeps_the_order", "reset_equals_the_base_for_qemu_and_frees_the_image"),
    ),
    Mutation(
        "reset: ALL_ALLOCATED is cleared before the bits",
        _RESET,
        "    overlay.clear_bitmap()\n    if overlay.all_allocated:\n"
        "        overlay.set_all_allocated(False)\n",
        "    if overlay.all_allocated:\n        overlay.set_all_allocated(False)\n"
        "    overlay.clear_bitmap()\n",
        _in("reset", "interrupted_reset_shows_all_or_the_base_and_is_finished"),
    ),
    Mutation(
        "reset: the image is freed first",
        _RESET,
        "    overlay.clear_bitmap()\n    if",
        "    overlay.image.file.punch(0, overlay.size)\n    overlay.clear_bitmap()\n    if",
        _in("reset", "interrupted_reset_shows_all_or_the_base_and_is_finished"),
    ),
    Mutation(
        "reset: --force overrides dependants",
        _DEPENDANTS,
        "        if dependants and not (access.force and can_force):\n",
        "        if dependants and not access.force:\n",
        _in("reset", "farm_reset_refuses_inner_layers_and_counts_them"),
    ),
    # Farms
    Mutation(
        "farm: an image keeps its turn while it waits for the disk",
        "addcow_mp/device/turns.py",
        "        self._turn = _own.turn\n",
        "        self._turn: Turn | None = None\n",
        _in("farm_order", "images_of_a_farm_wait_for_the_disk_at_the_same_time"),
    ),
    Mutation(
        "farm: an image is synced again when it is closed",
        _OVERLAY,
        "            if self._has_changed and self.cow.fd >= 0 ",
        "            if self.cow.fd >= 0 ",
        _in("farm_order", "each_image_of_a_farm_commit_keeps_its_order"),
    ),
    Mutation(
        "farm: a group whose process died fails as a whole",
        "addcow_mp/engine/pool.py",
        "        if len(parts) > 1:\n",
        "        if len(parts) > 1000:\n",
        _in("farm_kills", "image_that_kills_each_worker_fails_alone"),
    ),
    Mutation(
        "quick estimate: files with several names count as plain",
        "addcow_mp/farm/quick_estimate.py",
        "status.st_nlink == 1 and ",
        "",
        _in("quick_estimate", "quick_estimate_leaves_unusual_images_to_the_job"),
    ),
    Mutation(
        "quick estimate: locks of others are not looked at",
        "addcow_mp/farm/plain.py",
        "        require(not self._respects_locks or is_available(fd, READING))\n",
        "",
        _in("quick_estimate", "plan_refuses_a_file_that_a_guest_writes"),
    ),
    # From Python
    Mutation(
        "api: the stop of a time limit is one like any other",
        "addcow_mp/jobs/options.py",
        "        raise error.at_time_limit() from error\n",
        "        raise\n",
        _in("api_jobs", "time_limit_in_the_middle_of_a_job_is_an_error_of_its_own"),
    ),
    Mutation(
        "api: a stop is forgotten",
        "addcow_mp/api/arguments.py",
        "self._is_stopped = self._is_stopped or bool(asked())",
        "self._is_stopped = bool(asked())",
        _in("api_jobs", "stop_that_is_asked_for_once_is_a_stop"),
    ),
    Mutation(
        "api: an error of the caller's function is one of the task",
        "addcow_mp/api/arguments.py",
        "                self.error = error\n                return None\n",
        "                raise\n",
        _in("api_jobs", "error_in_a_callers_function_stops_the_job_and_is_raised"),
    ),
    Mutation(
        "scrub state: reading it drops the locks of a scrub in another thread",
        "addcow_mp/farm/scrub_state.py",
        "        if identity_at(path) in _in_use:\n            return",
        "        if False:\n            return",
        _in("scrub", "state_is_locked_while_a_thread_of_the_same_process_reads_it"),
    ),
)
