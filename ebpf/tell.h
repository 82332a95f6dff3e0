/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* What the daemon knows of a queue pair, written into its living entry where packets count in it. */
#ifndef QPD_TELL_H
#define QPD_TELL_H

#include "count.h"
#include "flow.h"

static __always_inline enum told tell_home(struct qp *qp, const struct tell *tell, __u64 now)
{
	if (tell->home == NO_PATH) {
		qp->wish = 0;
		return TOLD_DONE;
	}
	if (tell->hook != HOOK_STEER || tell->home >= PATHS_MAX || !(qp->members >> as_index(tell->home) & 1))
		return TOLD_REFUSED;
	qp->wish_idle_us = tell->idle_us;
	qp->wish = tell->home + 1;
	if (grant_wish(qp, now))
		return TOLD_DONE;
	qp->generation = NO_GENERATION;
	return TOLD_WAITS;
}

static __always_inline enum told tell_entry(struct __sk_buff *skb, struct counters *own)
{
	struct tell tell = {};
	struct qp *qp;

	if (bpf_skb_load_bytes(skb, ETH_HLEN, &tell, sizeof(tell)))
		return TOLD_MALFORMED;
	if (tell.hook == HOOK_STEER)
		qp = qps.lookup(&tell.key);
	else
		qp = arrivals.lookup(&tell.key);
	if (!qp)
		return TOLD_NO_ENTRY;
	if (tell.fields & TELL_LIFE && qp->restarts != tell.restarts)
		return TOLD_REFUSED;
	if (tell.fields & TELL_PEER && qp->peer_qp != tell.peer_qp) {
		qp->peer_qp = tell.peer_qp & PSN_MASK;
		watch(qp, false);
		qp->stamp_ns = 0;
	}
	if (tell.fields & TELL_WATCHED)
		watch(qp, tell.watched);
	if (tell.fields & TELL_HOME)
		return tell_home(qp, &tell, coarse_now(own));
	return TOLD_DONE;
}

#endif /* QPD_TELL_H */
