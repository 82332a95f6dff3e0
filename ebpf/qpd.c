/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* The classifier's two entry points. It never drops a packet: what it does not steer goes the kernel's own way. */
#include "arrive.h"
#include "count.h"
#include "flow.h"
#include "roce.h"

/* Egress of an uplink: gives a RoCEv2 packet its QP's path. */
int steer(struct __sk_buff *skb)
{
	struct packet packet;
	enum verdict verdict;

	if (guard_take(skb)) {
		count(HOOK_STEER, VERDICT_SECOND_PASS, NO_PATH, 0);
		return PASS;
	}
	verdict = parse(skb, &packet);
	if (verdict == VERDICT_OPEN)
		return steer_packet(skb, &packet);
	count(HOOK_STEER, verdict, NO_PATH, 0);
	return PASS;
}

/* Ingress of an uplink: counts what arrives. */
int observe(struct __sk_buff *skb)
{
	struct packet packet;
	enum verdict verdict;

	guard_take(skb); /* a veth carries skb->cb to the other end of its wire */
	verdict = parse(skb, &packet);
	if (verdict == VERDICT_OPEN)
		observe_packet(skb, &packet);
	else
		count(HOOK_OBSERVE, verdict, NO_PATH, 0);
	return PASS;
}
