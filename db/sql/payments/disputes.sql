-- Disputes. A row holds the dispute as of its last fetch; merchants read it and submit evidence. A warning of fraud
-- comes before a dispute, and is a column of its payment.
--
--   surety.advance_fraud_warnings     shows a payment's warning and emits its event; here
--   surety.advance_disputes           the fetch with the highest number wins; a changed status is an event; here
--   api.submit_evidence               merges evidence into the row
--   surety.begin_calls                commits what will be sent before it is sent
--   surety.emit_evidence_reminders    emits an event before evidence is due
--   surety.claim_objects_to_poll      polls unfinished disputes
--   api.get_dispute, api.list_disputes

create or replace function surety.emit_dispute_event(d surety.disputes, p_type text, p_at timestamptz) returns void
language sql volatile security definer set search_path = pg_catalog, pg_temp
begin atomic
    select outbox.emit_event(
        'dispute', d.id, p_type,
        jsonb_build_object(
            'payment_id', d.payment_id, 'dispute_id', d.id, 'status', d.status, 'at', surety.format_time(p_at),
            'amount_withdrawn', d.withdrawn_minor, 'evidence_revision', d.evidence_revision, 'version', d.version
        ),
        d.merchant_id, d.version
    );
end;

comment on function surety.emit_dispute_event(surety.disputes, text, timestamptz) is
'Emits an event of a type about a dispute as it is: status, version, amount withdrawn in minor units, revision of the
evidence.';

create or replace function surety.dispute_status(p_kind text, p_data jsonb) returns text
language sql immutable parallel safe
begin atomic
    select coalesce(
        p_data ->> 'status',
        case p_kind
            when 'dispute_opened' then 'needs_response'
            when 'dispute_flagged' then 'warning_needs_response'
            else substr(p_kind, 9)
        end
    );
end;

comment on function surety.dispute_status(text, jsonb) is
'The status of a dispute by a fact about it: the provider''s own in data.status, else the one that the kind implies.';

create or replace function surety.dispute_withdrawn(p_kind text, p_amount_minor bigint) returns bigint
language sql immutable parallel safe
begin atomic
    select case when p_kind in ('dispute_opened', 'dispute_lost') then greatest(0, p_amount_minor) else 0 end;
end;

comment on function surety.dispute_withdrawn(text, bigint) is
'How much of a dispute''s amount, in minor units, the network holds or keeps by a fact of this kind.';

create or replace function surety.advance_disputes(p_facts surety.facts[], p_actor text) returns text[]
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_now timestamptz := surety.time_now();
    v_known jsonb;
    v_changed surety.disputes [];
begin
    if not exists (select from unnest(p_facts) as f where f.kind like 'dispute\_%' and f.disregarded is null) then
        return '{}';
    end if;
    select jsonb_object_agg(d.provider_id, d.status) into v_known
    from unnest(p_facts) as f
    join surety.disputes as d on d.provider = f.provider and d.provider_account = f.account
        and d.provider_id = f.object_id;
    with last_fetches as (
        select distinct on (f.provider, f.account, f.object_id) f.*
        from unnest(p_facts) as f
        where f.kind like 'dispute\_%' and f.disregarded is null
        order by f.provider, f.account, f.object_id, f.revision desc
    ),
    written as (
        insert into surety.disputes as d (
            id, payment_id, merchant_id, status, amount_minor, withdrawn_minor, currency, reason, provider,
            provider_account, provider_id, revision, evidence_due_at, created_at, updated_at, poll_at
        )
        select
            surety.new_id('dp', v_now), p.id, p.merchant_id, s.status,
            greatest(1, coalesce((t.data ->> 'amount')::bigint, t.amount_minor)),
            surety.dispute_withdrawn(t.kind, t.amount_minor),
            t.currency, t.data ->> 'reason', t.provider, t.account, t.object_id, t.revision,
            (t.data ->> 'evidence_due_at')::timestamptz, v_now, v_now, v_now + k.poll_after
        from last_fetches as t
        join surety.payments as p on p.id = t.payment_id
        cross join lateral (select surety.dispute_status(t.kind, t.data) as status) as s
        left join surety.dispute_statuses as k on k.status = s.status
        order by t.payment_id, t.object_id
        on conflict (provider, provider_account, provider_id) do update
        set status = excluded.status, version = d.version + 1, withdrawn_minor = excluded.withdrawn_minor,
            reason = coalesce(excluded.reason, d.reason), revision = excluded.revision,
            -- A fetch without a deadline does not say that there is none.
            evidence_due_at = coalesce(
                excluded.evidence_due_at, case when d.status = excluded.status then d.evidence_due_at end
            ),
            updated_at = excluded.updated_at, poll_at = excluded.poll_at,
            -- When evidence is due again, as in an appeal, its submission and reminder start anew.
            submit_asked_at = case when d.status = excluded.status or not exists (
                select from surety.dispute_statuses as s where s.status = excluded.status and s.takes_evidence
            ) then d.submit_asked_at end,
            reminded_at = case when d.status = excluded.status then d.reminded_at end
        where d.revision < excluded.revision
        returning d
    )
    select array_agg(w.d order by (w.d).id) into v_changed
    from written as w where (w.d).status is distinct from v_known ->> (w.d).provider_id;

    -- A status that is new at Stripe becomes an event type at its first occurrence.
    insert into outbox.event_types (type, is_for_merchants, meaning)
    select distinct 'dispute.' || d.status, true, 'The dispute has the status ' || d.status || '.'
    from unnest(v_changed) as d
    where 'dispute.' || d.status not in (select t.type from outbox.event_types as t)
    on conflict (type) do nothing;
    perform surety.emit_dispute_event(d, 'dispute.' || d.status, v_now) from unnest(v_changed) as d;
    update outbox.dead_letters as l
    set closed_at = v_now, closed_as = 'resolved', closed_by = 'system',
        closed_because = 'the dispute is ' || d.status
    from unnest(v_changed) as d
    where l.payment_id = d.payment_id and l.type = 'dispute.evidence_given' and l.payload ->> 'dispute_id' = d.id
        and l.closed_at is null and not exists (
            select from surety.dispute_statuses as s where s.status = d.status and s.takes_evidence
        );
    insert into audit.entries (
        id, at, kind, actor, payment_id, merchant_id, from_state, to_state, outcome, reason, snapshot
    )
    select
        surety.new_id('aud', v_now), v_now, 'dispute', p_actor, d.payment_id, d.merchant_id,
        v_known ->> d.provider_id, d.status, 'done', d.reason,
        jsonb_build_object('dispute', d.id, 'object', d.provider_id, 'amount', d.amount_minor, 'currency', d.currency)
    from unnest(v_changed) as d;
    return array(select distinct 'dispute.' || d.status from unnest(v_changed) as d);
end;
$$;

comment on function surety.advance_disputes(surety.facts[], text) is
'Updates disputes to the fetch with the highest revision, and emits dispute.<status> for each changed status. Closes
dead letters of evidence once its dispute takes none any more. The payments are locked. Returns the types of the events
made.';

create or replace function surety.advance_fraud_warnings(p_facts surety.facts[]) returns text[]
language plpgsql volatile set search_path = pg_catalog, pg_temp
as $$
declare
    v_now timestamptz := surety.time_now();
    v_warned text [] := array(
        select distinct f.payment_id from unnest(p_facts) as f
        where f.kind in ('fraud_warning', 'fraud_warning_closed') and f.disregarded is null
    );
    -- These bounds exclude partitions before a statement begins.
    v_first_payment text := (select min(w.id collate "C") from unnest(v_warned) as w (id));
    v_last_payment text := (select max(w.id collate "C") from unnest(v_warned) as w (id));
begin
    if v_warned = '{}' then
        return '{}';
    end if;
    -- From all facts, so that the order in which they come has no effect: a closed warning stays closed.
    with newest as (
        select distinct on (f.payment_id)
            f.payment_id,
            jsonb_build_object(
                'type', f.data -> 'type', 'actionable', f.kind = 'fraud_warning',
                'at', surety.format_time(f.occurred_at)) as warning
        from unnest(v_warned) as warned (id) join surety.facts as f on f.payment_id = warned.id
        where f.payment_id between v_first_payment and v_last_payment and f.disregarded is null
            and f.kind in ('fraud_warning', 'fraud_warning_closed')
        order by f.payment_id, f.occurred_at desc, f.object_id desc, f.kind desc
    ),
    written as (
        update surety.payments as p set fraud_warning = n.warning, updated_at = v_now
        from newest as n
        where p.id = n.payment_id and p.id between v_first_payment and v_last_payment
            and p.fraud_warning is distinct from n.warning
        returning p.*
    )
    select array_agg(outbox.emit_event(
        'payment', w.id, 'payment.fraud_warning',
        jsonb_strip_nulls(jsonb_build_object(
            'payment_id', w.id, 'state', w.state, 'version', w.version, 'at', surety.format_time(v_now),
            'amount_captured', nullif(w.captured_minor, 0), 'amount_refunded', nullif(w.refunded_minor, 0),
            'amount_reversed', nullif(w.reversed_minor, 0), 'provider_id', w.provider_id, 'failure', w.failure,
            'next_action', w.next_action, 'fraud_warning', w.fraud_warning)),
        w.merchant_id, w.version))
    into v_warned from written as w;
    return case when v_warned is null then '{}' else array['payment.fraud_warning'] end;
end;
$$;

comment on function surety.advance_fraud_warnings(surety.facts[]) is
'Shows the newest warning of fraud of each payment that facts warn of, and emits payment.fraud_warning if it is new or
has been closed. The payments are locked and advanced. Returns the types of the events made.';
