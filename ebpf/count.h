/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Counters, and the events that tell the daemon of what it has not asked for. */
#ifndef QPD_COUNT_H
#define QPD_COUNT_H

#include "maps.h"

/* One look-up for both counters. `path` NO_PATH (or anything that is no path): only the verdict is counted. */
static __always_inline void count(enum hook hook, enum verdict verdict, __u32 path, __u32 bytes)
{
	__u32 zero = 0;
	struct counters *all = counters.lookup(&zero);

	if (!all)
		return;
	if (verdict < VERDICTS)
		all->verdicts[hook][verdict]++;
	if (path < PATHS_MAX) {
		all->path[hook][path].packets++;
		all->path[hook][path].bytes += bytes;
	}
}

static __always_inline void tell_qp(enum event_kind kind, const struct qp_key *key, __u32 path)
{
	struct event_qp event = {
	        .head = {.kind = kind, .path = path, .time_ns = bpf_ktime_get_ns()},
	        .key = *key,
	};

	/* A full ring drops the event: a hint lost, and no packet waits for the daemon. */
	events.ringbuf_output(&event, sizeof(event), 0);
}

#endif /* QPD_COUNT_H */
