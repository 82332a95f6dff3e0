/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Faults of a wire that are counted where they are made, queue pair by queue pair: what qpd says is judged by them.
 * PIN_DIR comes from the command line. The frames are the lab's: IPv4 without options, in VXLAN on an uplink. */
#include <uapi/linux/bpf.h>
#include <uapi/linux/pkt_cls.h>

#define ONE_IN 16 /* packets that meet their fate, by chance */
/* Between two late packets of a queue pair. Late ones in a row, as a busy machine would bring them, look like what go-back-N
 * sends again: nobody who only sees them pass could tell. */
#define APART_NS 100000000ULL

struct control {
	__u32 ifindex; /* where delayed packets go */
	__u32 pad;
};

/* destination QP -> packets dropped. */
BPF_TABLE_PINNED("hash", __u32, __u64, dropped, 4096, PIN_DIR "/dropped");
/* destination QP -> packets delayed. */
BPF_TABLE_PINNED("hash", __u32, __u64, delayed, 4096, PIN_DIR "/delayed");
/* destination QP -> CLOCK_MONOTONIC of the last packet that was delayed, ns. */
BPF_TABLE_PINNED("hash", __u32, __u64, diverted, 4096, PIN_DIR "/diverted");
BPF_TABLE_PINNED("array", __u32, struct control, control, 1, PIN_DIR "/control");

#define ETH        14
#define IP         20
#define UDP        8
#define VXLAN      8
#define PORT_VXLAN 4789
#define PORT_ROCE  4791
#define NONE       0xffffffff

/* The destination port of the UDP header that follows Ethernet and IPv4 at `at`; 0: there is none. */
static __always_inline __u32 port(void *start, void *end, __u32 at)
{
	__u8 *ip = start + at + ETH;
	__be16 *ports = start + at + ETH + IP;

	if ((void *)(ports + 2) > end || ip[0] != 0x45 || ip[9] != 17)
		return 0;
	return bpf_ntohs(ports[1]);
}

/* The destination QP of a RoCEv2 packet, encapsulated or not; NONE: it is another packet. */
static __always_inline __u32 dest_qp(void *start, void *end)
{
	__u32 at = 0, found = port(start, end, 0);
	__be32 *qp;

	if (found == PORT_VXLAN) {
		at = ETH + IP + UDP + VXLAN;
		found = port(start, end, ETH + IP + UDP + VXLAN);
	}
	if (found != PORT_ROCE)
		return NONE;
	qp = start + at + ETH + IP + UDP + 4;
	if ((void *)(qp + 1) > end)
		return NONE;
	return bpf_ntohl(*qp) & 0xffffff;
}

/* XDP: gone before any tap or tc program of the receiving end sees it, as if the wire had lost it. */
int lose(struct xdp_md *ctx)
{
	__u32 qp = dest_qp((void *)(long)ctx->data, (void *)(long)ctx->data_end);
	__u64 zero = 0, *count;

	if (qp == NONE || bpf_get_prandom_u32() % ONE_IN)
		return XDP_PASS;
	count = dropped.lookup_or_try_init(&qp, &zero);
	if (!count)
		return XDP_PASS;
	__sync_fetch_and_add(count, 1);
	return XDP_DROP;
}

/* tc ingress: some packets take a side track, where they lose time. */
int delay(struct __sk_buff *skb)
{
	__u32 index = 0, qp = dest_qp((void *)(long)skb->data, (void *)(long)skb->data_end);
	struct control *to = control.lookup(&index);
	__u64 zero = 0, now = bpf_ktime_get_ns(), *count, *last;

	if (qp == NONE || !to || bpf_get_prandom_u32() % ONE_IN)
		return TC_ACT_UNSPEC;
	count = delayed.lookup_or_try_init(&qp, &zero);
	last = diverted.lookup_or_try_init(&qp, &zero);
	if (!count || !last || now - *last < APART_NS)
		return TC_ACT_UNSPEC;
	*last = now;
	__sync_fetch_and_add(count, 1);
	return bpf_redirect(to->ifindex, 0);
}
