/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* The classifier's entry points. It never drops a packet: what it does not steer goes the kernel's own way. */
#include "arrive.h"
#include "bfd.h"
#include "count.h"
#include "flow.h"
#include "roce.h"
#include "tell.h"

/* Egress of an uplink: gives a RoCEv2 packet its QP's path, listens to this node's BFD daemon. */
int steer(struct __sk_buff *skb)
{
	struct counters *own = own_counters();
	enum verdict verdict = VERDICT_SECOND_PASS;
	struct packet *packet;

	if (!own)
		return PASS;
	packet = packet_in_hand(own);
	if (!guard_take(skb))
		verdict = parse(skb, packet);
	if (verdict == VERDICT_OPEN)
		return steer_packet(skb, packet, own);
	if (verdict == VERDICT_BFD)
		verdict = tap(skb, packet, HOOK_STEER);
	count(own, HOOK_STEER, verdict, NO_PATH, 0);
	return PASS;
}

/* Ingress of an uplink: counts what arrives, listens to the BFD peer. */
int observe(struct __sk_buff *skb)
{
	struct counters *own = own_counters();
	enum verdict verdict;
	struct packet *packet;

	guard_take(skb); /* a veth carries skb->cb to the other end of its wire */
	if (!own)
		return PASS;
	packet = packet_in_hand(own);
	verdict = parse(skb, packet);
	if (verdict == VERDICT_BFD)
		verdict = tap(skb, packet, HOOK_OBSERVE);
	if (verdict == VERDICT_OPEN)
		observe_packet(skb, packet, own);
	else
		count(own, HOOK_OBSERVE, verdict, NO_PATH, 0);
	return PASS;
}

/* On no hook: the daemon runs it by BPF_PROG_TEST_RUN, with a struct tell for a packet, and gets enum told. */
int tell(struct __sk_buff *skb)
{
	struct counters *own = own_counters();

	return own ? tell_entry(skb, own) : TOLD_MALFORMED;
}
