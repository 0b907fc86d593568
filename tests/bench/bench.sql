-- What the benchmarks add to a database of their own: a way to fill it quickly, and a handler to measure.
--
--   copy_payments      many payments at once, each a copy of one that the product made, row for row in every table
--   open_copied_accounts   what copying leaves out: accounts and balances
--   confirm_batch   a handler's batch: a fact, a step, an audit entry and two transfers for each event
--   confirm_one     the same for one payment, as a job of its own would do it
--   defer_jobs      such jobs, in Procrastinate's table

create schema bench;

create function bench.copied_id(p_prefix text, p_at timestamptz, p_n bigint, p_place bigint) returns text
language sql immutable parallel safe
begin atomic
    select surety.id_at(p_prefix, p_at) || substr(md5(p_n || ' ' || p_place), 1, 13);
end;

-- Copies p_from to p_to of a payment, of all merchants in turn, a millisecond apart, beginning at p_at. Needs
-- session_replication_role = replica, for the trigger of steps would write events and audit entries of its own.
create function bench.copy_payments(p_payment_id text, p_from bigint, p_to bigint, p_at timestamptz) returns void
language plpgsql
as $$
declare
    v_merchant text := (select p.merchant_id from surety.payments as p where p.id = p_payment_id);
begin
    create temporary table copies on commit drop as
    select
        n, made.at, bench.copied_id('pay', made.at, n, 0) as id,
        (select array_agg(m.id order by m.id) from surety.merchants as m) as merchants, null::text as merchant_id
    from generate_series(p_from, p_to) as n cross
    join lateral (select p_at + n * interval '1 millisecond' as at) as made;
    update copies set merchant_id = merchants[1 + n % cardinality(merchants)], merchants = null;
    analyze copies;

    insert into surety.payments (
        id, merchant_id, version, state, amount_minor, currency, captured_minor, refunded_minor, rail, capture_method,
        method_token, reference, description, return_url, off_session, customer, metadata, provider, provider_account,
        livemode, provider_id, created_at, updated_at, poll_at, authentication
    )
    select
        c.id, c.merchant_id, p.version, p.state, p.amount_minor, p.currency, p.captured_minor, p.refunded_minor, p.rail,
        p.capture_method, p.method_token, p.reference || '-' || c.n, p.description, p.return_url, p.off_session,
        p.customer, p.metadata, p.provider, p.provider_account, p.livemode, p.provider_id || c.n, c.at, c.at, p.poll_at,
        p.authentication
    from copies as c cross join surety.payments as p where p.id = p_payment_id;

    insert into surety.idempotency_keys (
        merchant_id, route, key, request_hash, payment_id, status, response, created_at
    )
    select c.merchant_id, k.route, k.key || '-' || c.n, k.request_hash, c.id, k.status, k.response, c.at
    from copies as c cross join surety.idempotency_keys as k where k.payment_id = p_payment_id;

    insert into surety.payment_labels (merchant_id, name, value, payment_id)
    select c.merchant_id, l.name, l.value, c.id
    from copies as c cross join surety.payment_labels as l where l.payment_id = p_payment_id;

    insert into surety.payment_references (merchant_id, reference, payment_id)
    select c.merchant_id, r.reference || '-' || c.n, c.id
    from copies as c cross join surety.payment_references as r where r.payment_id = p_payment_id;

    insert into surety.steps (payment_id, version, from_state, to_state, cause, implied, at, actor, request_id)
    select c.id, s.version, s.from_state, s.to_state, s.cause, s.implied, c.at, s.actor, s.request_id
    from copies as c cross join surety.steps as s where s.payment_id = p_payment_id;

    insert into surety.calls (
        payment_id, operation, idempotency_key, request, first_sent_at, last_sent_at, sends, answered_at, status
    )
    select c.id, l.operation, c.id || ':' || l.operation, l.request, c.at, c.at, l.sends, c.at, l.status
    from copies as c cross join surety.calls as l where l.payment_id = p_payment_id;

    insert into surety.provider_objects (provider, account, object_id, payment_id)
    select o.provider, o.account, o.object_id || c.n, c.id
    from copies as c cross join surety.provider_objects as o where o.payment_id = p_payment_id;

    insert into surety.provider_events (id, provider, account, livemode, event_id, type, headers, body, received_at)
    select
        bench.copied_id('whk', c.at, c.n, i.place), i.provider, i.account, i.livemode, i.event_id || c.n, i.type,
            i.headers,
        i.body, c.at
    from copies as c
    cross join (
        select provider_events.*, row_number() over (order by provider_events.id) as place from surety.provider_events
        where provider_events.id in (select f.source_id from surety.facts as f where f.payment_id = p_payment_id)
    ) as i;

    insert into surety.facts (
        id, payment_id, provider, account, livemode, object_id, kind, revision, amount_minor, currency, data, source,
        source_id, occurred_at, recorded_at
    )
    select
        bench.copied_id('fct', c.at, c.n, f.place), c.id, f.provider, f.account, f.livemode, f.object_id || c.n, f.kind,
        f.revision, f.amount_minor, f.currency, f.data, f.source,
        case when f.source = 'webhook' then bench.copied_id('whk', c.at, c.n, f.webhook) end, f.occurred_at, c.at
    from copies as c
    cross join (
        select
            facts.*, row_number() over (order by facts.id) as place,
            dense_rank() over (order by facts.source_id) as webhook
        from surety.facts where facts.payment_id = p_payment_id
    ) as f;

    insert into surety.fact_keys (provider, account, livemode, object_id, kind, revision, fact_id)
    select f.provider, f.account, f.livemode, f.object_id, f.kind, f.revision, f.id
    from copies as c join surety.facts as f on f.payment_id = c.id;

    insert into surety.expectations (payment_id, kind, opened_at, due_at, met_at)
    select c.id, x.kind, c.at, c.at, c.at
    from copies as c cross join surety.expectations as x where x.payment_id = p_payment_id;

    insert into ledger.postings (id, cause, rule, payment_id, at)
    select
        bench.copied_id('pst', c.at, c.n, p.place),
        case
            when p.cause like p_payment_id || ':%' then replace(p.cause, p_payment_id, c.id)
            else regexp_replace(p.cause, '^([^:]*)', '\1' || c.n)
        end,
        p.rule, c.id, c.at
    from copies as c
    cross join (
        select postings.*, row_number() over (order by postings.id) as place
        from ledger.postings where postings.payment_id = p_payment_id
    ) as p;

    insert into ledger.transfers (posting_id, leg, debit_account, credit_account, amount_minor, currency)
    select
        bench.copied_id('pst', c.at, c.n, t.place), t.leg, replace(t.debit_account, v_merchant, c.merchant_id),
        replace(t.credit_account, v_merchant, c.merchant_id), t.amount_minor, t.currency
    from copies as c
    cross join (
        select transfers.*, dense_rank() over (order by transfers.posting_id) as place
        from ledger.transfers join ledger.postings on postings.id = transfers.posting_id
        where postings.payment_id = p_payment_id
    ) as t;

    insert into outbox.events (id, aggregate_type, aggregate_id, type, payload, merchant_id, version, generation, at)
    select
        bench.copied_id('evt', c.at, c.n, e.place), e.aggregate_type, c.id, e.type,
        jsonb_set(e.payload, '{payment_id}', to_jsonb(c.id)), c.merchant_id, e.version, e.generation, c.at
    from copies as c
    cross join (
        select events.*, row_number() over (order by events.id) as place
        from outbox.events where events.aggregate_id = p_payment_id
    ) as e;

    insert into audit.entries (
        id, at, kind, actor, address, request_id, payment_id, merchant_id, version, from_state, to_state, outcome,
            reason,
        duration_ms, snapshot
    )
    select
        bench.copied_id('aud', c.at, c.n, e.place), c.at, e.kind, e.actor, e.address, e.request_id, c.id, c.merchant_id,
        e.version, e.from_state, e.to_state, e.outcome, e.reason, e.duration_ms, e.snapshot
    from copies as c
    cross join (
        select entries.*, row_number() over (order by entries.id) as place
        from audit.entries where entries.payment_id = p_payment_id
    ) as e;
    drop table copies;
end;
$$;

-- Opens the accounts that copied transfers name and sums up what they keep.
create function bench.open_copied_accounts() returns void
language sql
begin atomic
    insert into ledger.accounts (id, kind, owner_id, currency)
    select
        used.id,
        split_part(used.id, ':', 1),
        split_part(used.id, ':', 2),
        split_part(used.id, ':', 3)
    from (
        select transfers.debit_account as id from ledger.transfers
        union
        select transfers.credit_account from ledger.transfers
    ) as used
    on conflict (id) do nothing;

    insert into ledger.balances (account_id, balance_minor)
    select
        moved.account_id,
        sum(moved.amount_minor)
    from (
        select
            transfers.credit_account as account_id,
            transfers.amount_minor
        from ledger.transfers
        union all
        select
            transfers.debit_account,
            -transfers.amount_minor
        from ledger.transfers
    ) as moved
    inner join ledger.accounts on moved.account_id = accounts.id
    inner join ledger.account_kinds on accounts.kind = account_kinds.kind and account_kinds.keeps_balance
    group by moved.account_id
    on conflict (account_id) do update set balance_minor = excluded.balance_minor;
end;

-- The fact of a submitted payment: its charge was captured.
create function bench.captured(p_payment_ids text[]) returns jsonb
language sql stable security definer
begin atomic
    select jsonb_agg(jsonb_build_object(
        'payment_id', payments.id, 'provider', payments.provider, 'account', payments.provider_account,
        'livemode', payments.livemode, 'object_id', replace(payments.provider_id, 'pi_', 'ch_'), 'kind', 'captured',
        'amount_minor', payments.amount_minor, 'currency', payments.currency, 'source', 'poll'
    ))
    from surety.payments where payments.id = any(p_payment_ids);
end;

create function bench.confirm_batch(p_batch bigint, p_fence bigint, p_event_ids text[]) returns boolean
language plpgsql security definer
as $$
begin
    perform surety.record_facts(
        bench.captured(array(
            select e.aggregate_id from outbox.batch_events(p_batch, p_fence) as e where e.event_id = any(p_event_ids))),
        'handler:bench');
    return outbox.complete_events(p_batch, p_fence, p_event_ids);
end;
$$;

create function bench.confirm_one(p_payment_id text) returns void
language sql security definer
begin atomic
    select surety.record_facts(bench.captured(array[p_payment_id]), 'handler:bench');
end;

-- A job for each of some payments that are submitted, as many as asked for.
create function bench.defer_jobs(p_limit integer) returns bigint
language sql set search_path = procrastinate, pg_catalog
begin atomic
    with deferred as (
        insert into procrastinate.procrastinate_jobs (queue_name, task_name, args)
        select
            'bench',
            'confirm_one',
            jsonb_build_object('payment_id', payments.id)
        from surety.payments
        where payments.state = 'provider_submitted'
        order by payments.id
        limit p_limit
        returning id
    )

    select count(*) from deferred;
end;

insert into outbox.handlers (handler, meaning, batch_size, batches_at_once, generation, seen)
values ('bench', 'Does nothing.', 500, 2, outbox.current_restore_generation(), '1:1:');
insert into outbox.handler_events (handler, event_type) values ('bench', 'payment.provider_submitted');

grant usage on schema bench to surety_worker;
