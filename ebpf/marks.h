/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* When PSNs were first asked for and first answered: an answer that came before its request is another QP's, however much
 * alike two QPs are otherwise. The daemon compares (qpd/core/marks.py), and says whom it watches: to read the clock for
 * each packet is too much for the common way.
 *
 * An entry remembers one PSN of each of MARKS classes, the newest that came by. Class n holds the odd multiples of
 * 2^MARK_EXPONENT(n), so the time between two of its PSNs grows from class to class: slow QPs have most of their PSNs
 * marked between two looks at the map, and fast ones have some mark that still stands while both directions are read. */
#ifndef QPD_MARKS_H
#define QPD_MARKS_H

#include "maps.h"

/* Of each class that has PSNs beyond `before` up to `psn`. No branches on what packets say: the verifier would follow each
 * way. No unrolling: to compile it takes longer than all the rest. */
static __always_inline void set_marks(__u32 *marks, __u32 before, __u32 psn, __u32 when)
{
	psn = before + ((psn - before) & PSN_MASK);
#pragma clang loop unroll(disable)
	for (int n = 0; n < MARKS; n++) {
		__u32 half = 1U << MARK_EXPONENT(n);
		__u32 passed = ((before + half) ^ (psn + half)) >> (MARK_EXPONENT(n) + 1);
		__u32 mask = (__s32)(passed | -passed) >> 31;

		marks[n] = (marks[n] & ~mask) | (when & mask);
	}
}

static __always_inline __u32 mark_now(void)
{
	__u32 when = bpf_ktime_get_ns() >> MARK_SHIFT;

	return when + !when;
}

/* The PSNs behind `before` up to `psn` are asked for. */
static __always_inline void mark_asked(struct qp *qp, __u32 before, __u32 psn)
{
	if (qp->slot & SLOT_WATCHED)
		set_marks(qp->asked_at, before, psn, mark_now());
}

/* They were passed over: if they were sent another way, nobody here knows when. */
static __always_inline void mark_missed(struct qp *qp, __u32 before, __u32 psn)
{
	if (qp->slot & SLOT_WATCHED)
		set_marks(qp->asked_at, before, psn, 0);
}

/* The PSNs behind `acked_psn` up to `psn` are acknowledged. Of the first answer nobody knows how many it is to. */
static __always_inline void mark_answered(struct qp *qp, __u32 psn)
{
	if (qp->slot & SLOT_WATCHED && qp->acked_psn & PSN_KNOWN)
		set_marks(qp->answered_at, qp->acked_psn & PSN_MASK, psn, mark_now());
}

static __always_inline void forget_marks(struct qp *qp)
{
	__builtin_memset(qp->asked_at, 0, sizeof(qp->asked_at));
	__builtin_memset(qp->answered_at, 0, sizeof(qp->answered_at));
}

static __always_inline void watch(struct qp *qp, bool watched)
{
	forget_marks(qp);
	qp->slot = (qp->slot & ~SLOT_WATCHED) | (watched ? SLOT_WATCHED : 0);
}

#endif /* QPD_MARKS_H */
