/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Counters, and the events that tell the daemon of what it has not asked for. */
#ifndef QPD_COUNT_H
#define QPD_COUNT_H

#include "maps.h"

static __always_inline struct counters *own_counters(void)
{
	__u32 zero = 0;

	return counters.lookup(&zero);
}

/* `path` NO_PATH (or anything that is no path): only the verdict is counted. */
static __always_inline void count(struct counters *own, enum hook hook, enum verdict verdict, __u32 path, __u32 bytes)
{
	__u32 index = verdict;

	/* The barriers keep one register from the compare to the use: newer compilers compare a copy, of which the verifier
	 * does not know that it is the same number. */
	asm volatile("" : "+r"(index));
	if (index < VERDICTS)
		own->verdicts[hook][index]++;
	asm volatile("" : "+r"(path));
	if (path < PATHS_MAX) {
		own->path[hook][path].packets++;
		own->path[hook][path].bytes += bytes;
	}
}

/* CLOCK_MONOTONIC to a timer tick or two. Reading the coarse clock costs 16 ns, a quarter of all that steering does; the
 * tick count costs one, and the clock needs to be read only when it has moved. */
static __always_inline __u64 coarse_now(struct counters *own)
{
	__u64 tick = bpf_jiffies64();

	if (own->tick != tick) {
		own->tick = tick;
		own->tick_ns = bpf_ktime_get_coarse_ns();
	}
	return own->tick_ns;
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
